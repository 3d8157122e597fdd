"""Mistakes in a worker: its roles, blocks, sequences, steps, draws, group, and the switch that ends it."""

from tests.mutations.mutation import Mutation

ROLES = "tests/unit/test_roles.py"
INTERLEAVING = "tests/unit/test_every_interleaving.py"
CROWDS = "tests/unit/test_simulation.py::test_whatever_happens_answers_are_right_and_pools_end_whole[0]"
POOL = "tests/unit/test_block_pool.py"
SAMPLER = "tests/unit/test_sampler.py"
STEPS = "tests/unit/test_step_loop.py"
SWITCH = "tests/unit/test_dead_man_switch.py"

PREFILL = [
    ("role", "if job is None or job.sequence is not sequence:", "if job is None:", CROWDS),
    ("role", "        job.first_token_id = drawn.token_id\n", "", ROLES),
    ("role", "case Prefill() if message.attempt in self._jobs:", "case Prefill() if False:", ROLES),
    ("role", "0 if sequence.request.generated_token_ids else num_cached_tokens", "num_cached_tokens", CROWDS),
    ("role", "if not 0 <= first_position <= sequence.num_known_tokens:", "if False:", ROLES),
    ("role", "if not all(token.is_valid for token in drawn):", "if False:", STEPS),
    ("role", "sorted(self._computing, key=lambda job: job.grant is None)", "list(self._computing)", ROLES),
    ("admission", "jobs = self._granted or self._ungranted", "jobs = self._ungranted or self._granted", ROLES),
    ("admission", "self._set_back(self._ahead.pop())", "self._set_back(self._ahead.pop(0))", ROLES),
    ("admission", "+ job.num_blocks <= limit", "<= limit", ROLES),
    ("admission", "self._ungranted.appendleft(job)", "self._ungranted.append(job)", ROLES),
]

DECODE = [
    ("role", "case Reserve() if message.attempt in self._reservations:", "case Reserve() if False:", ROLES),
    ("role", "if handoff.manifest != wanted:", "if False:", ROLES),
    ("role", "if not reservation.unready and not reservation.is_granted:", "if not reservation.is_granted:", ROLES),
    ("role", "if reservation.incomplete or reservation.handoff is None:", "if reservation.handoff is None:", ROLES),
    ("role", "        self._inbox.drop(attempt)\n", "", ROLES),
    ("role", "        if reservation.hold:\n            reservation.hold.release()", "", ROLES),
    ("role", "- sequence.num_prompt_tokens - 1", "- sequence.num_known_tokens - 1", CROWDS),
    ("role", "and chunk.end % self._pool.block_size == 0:", "and False:", CROWDS),
    (
        "role",
        "        if reservation is None or reservation.sequence is not None:",
        "        if reservation is None:",
        ROLES,
    ),
    (
        "running",
        "return youngest if youngest and youngest.number > reservation.number else None",
        "return youngest",
        ROLES,
    ),
    ("running", "if can_park else most", "", ROLES),
    ("running", "        return not self._parked", "        return True", ROLES),
    ("running", "self._pool.blocks_for(sequence.num_launched)", "self._pool.blocks_for(sequence.num_computed)", CROWDS),
    ("running", "            self._ranks.order(Discard(reservation.attempt))\n", "", CROWDS),
]

BLOCKS = [
    ("block_pool", "for block in reversed(block_ids):", "for block in block_ids:", POOL),
    ("block_pool", "self._cached.popitem(last=False)", "self._cached.popitem()", POOL),
    ("block_pool", "len(self._cached) - len(self._cached.keys() & known)", "len(self._cached)", POOL),
    ("block_pool", "            if self._num_holds[block]:\n                continue\n", "", POOL),
    (
        "block_pool",
        "not in self._name_of_block and name not in self._block_of_name:",
        "not in self._name_of_block:",
        POOL,
    ),
    ("block_pool", "if block not in known)", ")", POOL),
    ("prefix_hash", 'salt.encode("utf-8", "surrogatepass")', 'b""', POOL),
    ("prefix_hash", 'len(part).to_bytes(8, "little") + part', "part", POOL),
    ("prefix_hash", "request.num_known_tokens - 1", "request.num_known_tokens", ROLES),
    (
        "parked_kv",
        "[part[:, :, first_position:]",
        "[part[:, :, : part.shape[2] - first_position]",
        "tests/unit/test_parked_kv.py",
    ),
]

STEPS_AND_DRAWS = [
    ("sampler", "if row.position < row.params.min_tokens:", "if row.position <= row.params.min_tokens:", SAMPLER),
    ("sampler", "logits.sum(dim=-1).isfinite()", "~logits.sum(dim=-1).isnan()", SAMPLER),
    ("sampler", "        logits = logits.clone()\n", "", SAMPLER),
    ("sampler", "        self._count(rows, token_ids)", "        pass", SAMPLER),
    ("sampler", "tuple(values[i][:num])", "tuple(values[i])", SAMPLER),
    ("sampler", "row.given is None and row.params.is_penalized", "row.params.is_penalized", SAMPLER),
    (
        "sampler",
        "for p in params],\n            [row.position for row in rows],",
        "for p in params],\n            [0 for row in rows],",
        SAMPLER,
    ),
    ("token_counts", "ids[ids < vocab_size]", "ids.clamp(max=vocab_size - 1)", SAMPLER),
    ("token_counts", "self.in_output[row].zero_()", "self.in_output[row]", SAMPLER),
    ("sequence", "num_output >= sampling.min_tokens and ", "", STEPS),
    (
        "sequence",
        "- self.num_prompt_tokens >= self.request.sampling.max_tokens",
        "- self.num_prompt_tokens > self.request.sampling.max_tokens",
        STEPS,
    ),
    (
        "sequence",
        "self.chain.of(self.token_ids, self.num_computed)",
        "self.chain.of(self.token_ids, len(self.token_ids))",
        CROWDS,
    ),
    ("step_loop", "                budget -= chunk.num_tokens\n", "", STEPS),
    ("step_loop", "list(role_of.items())[-1]", "list(role_of.items())[0]", "tests/unit/test_out_of_memory.py"),
    ("step_loop", "position + 1 - sequence.num_prompt_tokens", "position + 1 - sequence.num_known_tokens", CROWDS),
    ("step_loop", "sequence.token_ids[position + 1]", "sequence.token_ids[position]", STEPS),
    ("batching", "key=lambda chunk: chunk.num_tokens > 1", "key=lambda chunk: chunk.num_tokens", STEPS),
    ("batching", "first_token + position - chunk.start", "first_token + position", STEPS),
    ("group", "identity != _identity_of(report.rank) or ", "", "tests/integration/test_group_channel.py"),
    ("group", "            if self.size == 1:\n                raise\n", "", "tests/unit/test_out_of_memory.py"),
]

SWITCHES = [
    ("max(self._longest_gap_s, now - self._pulsed_at)", "self._longest_gap_s", SWITCH),
    ("max(self._least_s, TIMES_LONGEST_GAP", "min(self._least_s, TIMES_LONGEST_GAP", SWITCH),
    ("        self._longest_gap_s = None\n        self._arm(seconds)", "        self._arm(seconds)", SWITCH),
    ("        self._arm(None)", "        self._arm(0.0)", SWITCH),
]

LOOPS = [
    ("if was_busy and not self._is_busy:", "if False:", CROWDS),
    ("            self._ranks.order(ClosePeer(message.epoch))\n", "", CROWDS),
]


def _in(folder: str, mistakes: list[tuple[str, str, str, str]]) -> list[Mutation]:
    return [Mutation(f"{folder}/{file}.py", *rest) for file, *rest in mistakes]


MUTATIONS = [
    *_in("prefill_worker", PREFILL),
    *_in("decode_worker", DECODE),
    *_in("engine", BLOCKS + STEPS_AND_DRAWS),
    *_in("worker", [("dead_man_switch", *switch) for switch in SWITCHES] + [("loops", *loop) for loop in LOOPS]),
]
