"""Mistakes in what travels: layouts, plans, frames, both ends of a transfer, orders and reports."""

from tests.mutations.mutation import Mutation

PLAN = "tests/unit/test_plan.py"
FRAMES = "tests/unit/test_frames.py"
SENDER = "tests/integration/test_transports_sender.py"
FAULTS = "tests/unit/test_simulation.py::test_whatever_happens_answers_are_right_and_pools_end_whole[0]"

TRANSFER = [
    ("plan", "share * holding + rank % wanting % holding", "share * holding", PLAN),
    ("plan", "max(one[0], other[0])", "min(one[0], other[0])", PLAN),
    ("plan", "range((start // size + 1) * size, stop, size)", "range(start + size, stop, size)", PLAN),
    ("plan", "* ceil(tokens / UNIT_TOKENS)\n", "* max(1, tokens // UNIT_TOKENS)\n", PLAN + " " + FRAMES),
    ("plan", "if len(block_ids) * block_size < num_positions:", "if False:", PLAN),
    ("plan", "if not 0 <= block_id < num_blocks)", "if not 0 <= block_id <= num_blocks)", PLAN),
    ("plan", "(part.heads[0] - first, part.heads[1] - first)", "part.heads", PLAN),
    ("frames", "if version != FRAME_VERSION:", "if False:", FRAMES),
    ("frames", "if digest_of(body) != digest:", "if False:", FRAMES),
    ("frames", "< len(data) <= MAX_HEADER_BYTES:", "< len(data):", FRAMES),
    ("digests", "if found != header.unit_digests:", "if found[:8] != header.unit_digests[:8]:", FRAMES),
    ("digests", "if len(payload) != piece.num_bytes:", "if len(payload) < piece.num_bytes:", FRAMES),
    ("receiver", "is_missing = key in transfer.missing", "is_missing = True", FAULTS),
    ("receiver", " if transfer.order.source.epoch == epoch]", "]", FAULTS),
    ("sender", "        self._transport.drop(attempt)\n        self._reports", "        self._reports", SENDER),
    ("sender", "if transfer.num_resends[key] >= MAX_RESENDS:", "if False:", FAULTS),
    ("sender", "if lane.staged_bytes and lane.staged_bytes + num_bytes > WINDOW_BYTES:", "if False:", SENDER),
    ("sender", "if piece.tokens[1] <= self.num_computed:", "if piece.tokens[0] <= self.num_computed:", FAULTS),
]

PROTOCOL = [
    ("layout", "rank * plane.heads // size", "rank", PLAN),
    ("layout", "return self.num_layers * self.block_size * sum", "return self.block_size * sum", PLAN),
    ("layout", '            "num_layers": self.num_layers,\n', "", PLAN),
    ("layout", "(heads % ranks and ranks % heads)", "heads % ranks", PLAN),
    (
        "orders",
        '    except UNPARSABLE as error:\n        raise WireError(f"report',
        '    except KeyError as error:\n        raise WireError(f"report',
        "tests/integration/test_group_channel.py tests/unit/test_plain_msgpack.py",
    ),
    ("secret", 'b"tandem " + purpose.encode()', 'b"tandem "', "tests/unit/test_secret.py"),
    ("secret", "or stat.S_IMODE(status.st_mode) & 0o077", "", "tests/unit/test_secret.py"),
]

MUTATIONS = [
    *(Mutation(f"kv_transfer/{file}.py", *rest) for file, *rest in TRANSFER),
    *(Mutation(f"protocol/{file}.py", *rest) for file, *rest in PROTOCOL),
]
