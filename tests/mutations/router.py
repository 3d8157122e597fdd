"""Mistakes in the router's control: attempts and their courses, dispatch, lives of requests and of workers."""

from tests.mutations.mutation import Mutation

ATTEMPTS = "tests/unit/test_router_attempts.py"
DISPATCH = "tests/unit/test_router_dispatch.py"
MEMBERSHIP = "tests/unit/test_router_membership.py"

CONTROL = [
    ("attempts", " or course.attempt != message.attempt", "", ATTEMPTS),
    ("attempts", "            self._avoidance.failed(end.attempt, self._now_s)\n", "            pass\n", ATTEMPTS),
    ("attempts", "if course.is_suspect and self._has_suspect(pair):", "if False:", ATTEMPTS),
    ("attempts", "            if epoch in life.holding_epochs\n", "", ATTEMPTS),
    ("attempts", "*life.token_ids[:-1])", "*life.token_ids)", "tests/unit/test_held_prefixes.py " + ATTEMPTS),
    ("attempts", "if course.not_before_s > self._now_s:", "if False:", ATTEMPTS),
    ("attempts", "            self._quarantine.add(course.request, self._now_s)\n", "            pass\n", ATTEMPTS),
    ("attempts", "        self._quarantine.check(request, self._now_s)\n", "", ATTEMPTS),
    ("course", "self.request.generated_token_ids + drawn", "drawn", ATTEMPTS),
    ("course", 'case "worker_lost" if is_suspected:', 'case "worker_lost":', ATTEMPTS),
    ("course", "if self._num_crashes <= MAX_CRASHES:", "if self._num_crashes < MAX_CRASHES:", ATTEMPTS),
    ("course", "if len(drawn) >= PROGRESS_TOKENS:", "if drawn:", ATTEMPTS),
    ("course", "if self._num_failures > MAX_FAILURES:", "if False:", ATTEMPTS),
    ("dispatch", " or (self._best(need._replace(avoided=frozenset())) if avoided else None)", "", DISPATCH),
    ("dispatch", "if prefill >= num_prompt_tokens", "if prefill", DISPATCH),
    (
        "dispatch",
        "        self.prefilled(attempt)\n        if num_tokens := self._reserved",
        "        if num_tokens := self._reserved",
        DISPATCH,
    ),
    ("dispatch", "kind = (group.endpoint.transport, *group", "kind = (*group", DISPATCH),
    ("dispatch", "self._prefill.find(need.near, need.num_known_tokens)", "None", ATTEMPTS),
    ("dispatch", "for epoch in [epoch for epoch in counts if epoch not in epochs]:", "for epoch in []:", DISPATCH),
    (
        "ranking",
        "        heappush(self._heap, (self._cost(self.groups[place]), place))\n        if",
        "        if",
        DISPATCH,
    ),
    ("lifecycle", "if sender not in self._senders(message):", "if False:", ATTEMPTS),
    ("lifecycle", "if update.index != self.next_index:", "if False:", ATTEMPTS),
    ("lifecycle", "if not self._is_token(update.token_id):", "if False:", ATTEMPTS),
    ("lifecycle", "        self.holders.discard(Side.PREFILL)\n        if not", "        if not", ATTEMPTS),
    ("lifecycle", "if self._is_granted or self.stage.is_end:", "if self.stage.is_end:", ATTEMPTS),
    ("lifecycle", "_COMPUTING.get(self.stage) in lost", "True", ATTEMPTS),
    ("lifecycle", "keep={Side.PREFILL} if is_decoded else set()", "keep=set()", ATTEMPTS),
    (
        "lifecycle",
        'return None if self._is_handed_off else "a token from decode before the handoff"',
        "return None",
        ATTEMPTS,
    ),
    ("avoidance", "FIRST_S * 2 ** (num - 1)", "FIRST_S * num", ATTEMPTS),
    ("membership", "if info.epoch in self._past:", "if False:", MEMBERSHIP),
    ("membership", "if rank is not lost or is_reachable]", "if rank is not lost]", MEMBERSHIP),
    ("membership", "*told, *lost]", "*lost]", MEMBERSHIP),
    ("membership", "- self._heard - self._heard_before", "- self._heard", MEMBERSHIP),
    ("membership", "if not group.is_complete:", "if False:", MEMBERSHIP),
    ("membership", "if endpoint.epoch != rank.info.epoch:", "if False:", MEMBERSHIP),
    ("membership", "message.doing[:MAX_DOING_CHARS]", "message.doing", MEMBERSHIP),
    ("membership", "        group.ready = None\n", "", MEMBERSHIP),
]

MUTATIONS = [Mutation(f"router/control/{file}.py", *rest) for file, *rest in CONTROL]
