"""One life of one group in a small world: production's role, pool and step loop over caches that are dictionaries.

A transfer is one frame per token, so that a state can be copied and compared.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from decode_worker.inbox import RemoteInbox
from decode_worker.prefix_server import NoPrefixServer
from decode_worker.role import DecodeRole
from decode_worker.running import ALL_AT_ONCE, Growth, Running
from engine.block_pool import BlockPool
from engine.sampler import Drawn
from engine.step_loop import StepLoop
from prefill_worker.fetcher import NoFetcher
from prefill_worker.outbox import RemoteOutbox
from prefill_worker.role import PrefillRole
from protocol.identity import Attempt, Epoch
from protocol.layout import Endpoint, KVLayout, keys_and_values
from protocol.messages import AnyMessage, Tokens, TokenUpdate
from protocol.orders import (
    AnyOrder,
    AnyReport,
    Batch,
    Broken,
    Discard,
    DropTransfer,
    ExpectBlocks,
    Expecting,
    Park,
    Received,
    SendBlocks,
    SendMore,
    Unpark,
)
from protocol.request import Request, SamplingParams

VOCAB_SIZE = 100
KV = tuple[int, int]  # token, position

REQUESTS = {
    f"r{index}": Request(f"r{index}", (index,), SamplingParams(max_tokens=2, seed=0, temperature=0.0))
    for index in range(1, 4)
}
LONG_REQUESTS = {
    f"r{index}": Request(f"r{index}", (index, 10 + index), SamplingParams(max_tokens=2, seed=0, temperature=0.0))
    for index in range(7, 9)
}
"""Prompts that take a step for each of their two tokens, so that the first may leave before the second is computed."""


GROWING_REQUESTS = {
    f"r{index}": Request(f"r{index}", (index,), SamplingParams(max_tokens=3, seed=0, temperature=0.0))
    for index in range(4, 7)
}
"""Answers that outgrow a reservation for the prompt and one token."""


class Violation(AssertionError):
    """What must never happen; the message says what."""


def oracle_token(context: Iterable[KV]) -> int:
    """Return the model's next token: different for every different context of these small worlds."""
    return sum((token + 7) * (position + 3) for token, position in context) % VOCAB_SIZE


def expected_tokens(request: Request) -> list[int]:
    tokens = list(request.prompt_token_ids)
    for _ in range(request.sampling.max_tokens):
        tokens.append(oracle_token((token, position) for position, token in enumerate(tokens)))
    return tokens[len(request.prompt_token_ids) :]


def request_of(name: str) -> Request:
    return (REQUESTS | LONG_REQUESTS | GROWING_REQUESTS)[name]


def endpoint_of(epoch: Epoch, block_size: int) -> Endpoint:
    return Endpoint(epoch, KVLayout("m", 1, keys_and_values(1, 1, "float32"), block_size, 1), "zmq", ("a",))


@dataclass(frozen=True)
class Limits:
    """What both groups are given. num_blocks: prefill's and decode's. is_any_order: decode may grant as it likes."""

    num_blocks: tuple[int, int]
    block_size: int = 1
    outbox_share: float = 1.0
    growth: Growth = ALL_AT_ONCE
    is_any_order: bool = False


class Arbitrary(DecodeRole):
    """Lets a reservation in when the world says so, whichever it is."""

    def _admit(self) -> None:
        self._running.restore()

    def admit(self, index: int) -> None:
        reservation = self._waiting[index]
        if self._running.restore() and self._start(reservation):
            self._waiting.remove(reservation)


class Life:
    """One life of one group: what engine.role calls Outlet and Ranks, and the step loop's forward."""

    size = 1

    def __init__(self, epoch: Epoch, is_prefill: bool, limits: "Limits", step_tokens: int) -> None:
        self.epoch = epoch
        self.block_size = block_size = limits.block_size
        self.pool = BlockPool(limits.num_blocks[not is_prefill], block_size, is_caching=False)
        self.parked: dict[Attempt, tuple[KV, ...]] = {}
        self.kv: dict[int, KV] = {}
        self.expected: dict[Attempt, tuple[ExpectBlocks, set[int]]] = {}
        self.sending: dict[Attempt, tuple[SendBlocks, int]] = {}
        self.reports: deque[AnyReport] = deque()
        self.sent: list[AnyMessage] = []
        self.frames: list[tuple[Attempt, int, KV]] = []
        layout = endpoint_of(epoch, block_size).layout
        if is_prefill:
            outbox = RemoteOutbox(self.pool, self, layout, limits.outbox_share)
            self.role = PrefillRole(self.pool, outbox, NoFetcher(), self, "m", 8)
        else:
            running = Running(self.pool, self, limits.growth)
            kind = Arbitrary if limits.is_any_order else DecodeRole
            self.role = kind(self.pool, RemoteInbox(self, layout), NoPrefixServer(), self, running, "m", 8)
        self.steps = StepLoop([self.role], self.forward, Tokenwise, step_tokens, block_size)

    def send(self, message: AnyMessage) -> None:
        self.sent.append(message)

    def emit(self, update: TokenUpdate) -> None:
        self.sent.append(Tokens((update,)))

    def order(self, order: AnyOrder) -> None:
        match order:
            case ExpectBlocks():
                positions = set(range(order.first_position, order.first_position + order.num_tokens))
                self.expected[order.attempt] = (order, positions)
                self.reports.append(Expecting(0, order.attempt))
            case DropTransfer():
                self.expected.pop(order.attempt, None)
                self.sending.pop(order.attempt, None)
            case SendBlocks():
                self._send(order, order.first_position, order.num_computed)
            case SendMore() if order.attempt in self.sending:
                self._send(*self.sending.pop(order.attempt), order.num_computed)
            case Park():
                self.parked[order.attempt] = tuple(self._read(order.block_ids, p) for p in range(order.num_tokens))
            case Unpark():
                for position, kv in enumerate(self.parked.pop(order.attempt)):
                    self.kv[self._slot(order.block_ids, position)] = kv
            case Discard():
                del self.parked[order.attempt]

    def _send(self, order: SendBlocks, first: int, num_computed: int) -> None:
        """Send what is computed from position first on; the rest waits for SendMore."""
        stop = order.first_position + order.num_tokens
        end = min(stop, max(first, num_computed))
        for position in range(first, end):
            self.frames.append((order.attempt, position, self._read(order.block_ids, position)))
        if end < stop:
            self.sending[order.attempt] = (order, end)

    def land(self, attempt: Attempt, position: int, kv: KV) -> None:
        """A frame has come: checked against what is expected, then copied."""
        order, missing = self.expected.get(attempt, (None, set()))
        if order is None or position not in missing:
            return
        self.kv[self._slot(order.block_ids, position)] = kv
        missing.discard(position)
        if not missing:
            del self.expected[attempt]
            self.reports.append(Received(0, attempt))

    def close_peer(self, epoch: Epoch) -> None:
        for attempt in [a for a, (order, _) in self.expected.items() if order.source.epoch == epoch]:
            del self.expected[attempt]
            self.reports.append(Broken(0, attempt, "the source group is gone"))

    def forward(self, batch: Batch, _: list[int] | None) -> list[int]:
        tokens, drawn = iter(batch.token_ids), []
        for query_len, context_len, table in zip(batch.query_lens, batch.context_lens, batch.block_tables, strict=True):
            blocks = memoryview(table).cast("i")
            for position in range(context_len - query_len, context_len):
                self.kv[self._slot(blocks, position)] = (next(tokens), position)
            first = context_len - query_len
            drawn += [oracle_token(self._read(blocks, p) for p in range(end + 1)) for end in range(first, context_len)]
        return [drawn[index] for index in batch.sampled]

    def forget_free_blocks(self) -> None:
        """What lies in free blocks may not matter; and it does not matter which of them is taken next."""
        self.pool._free.sort(reverse=True)
        free = set(self.pool._free)
        self.kv = {slot: kv for slot, kv in self.kv.items() if slot // self.block_size not in free}

    def _slot(self, blocks: "memoryview[int]", position: int) -> int:
        return blocks[position // self.block_size] * self.block_size + position % self.block_size

    def _read(self, blocks: "memoryview[int]", position: int) -> KV:
        return self.kv.get(self._slot(blocks, position), (-1, -1))


class Tokenwise:
    """Stands in for engine.sampler.Drawing: forward has drawn already."""

    def __init__(self, token_ids: list[int], rows: object) -> None:
        self.token_ids = token_ids

    def collect(self) -> list[Drawn]:
        return [Drawn(token, None, True) for token in self.token_ids]


def life_key(life: Life) -> tuple:
    role = life.role
    jobs = role._jobs.values() if isinstance(role, PrefillRole) else role._reservations.values()
    expected = tuple((attempt, frozenset(missing)) for attempt, (_, missing) in life.expected.items())
    held = tuple(life.pool._num_holds)
    under_way = (expected, tuple((attempt, first) for attempt, (_, first) in life.sending.items()))
    kept = (held, frozenset(life.kv.items()), frozenset(life.parked.items()))
    return life.epoch, kept, tuple(map(_job_key, jobs)), _order_key(role), tuple(life.reports), under_way


def _order_key(role: PrefillRole | DecodeRole) -> tuple:
    """Who is where in the queues; in which order decode's wait, and in which those run, is the order of all."""
    if isinstance(role, DecodeRole):
        return tuple(role._running._booked)
    admission = role._admission
    queues = (admission._granted, admission._ungranted, admission._ahead, role._computing)
    return tuple(tuple(job.prefill.attempt for job in queue) for queue in queues)


def _job_key(job) -> tuple:
    sequence, hold = job.sequence, getattr(job, "hold", None)
    if hasattr(job, "prefill"):
        progress = (job.is_sending, job.computed_at is not None, job.first_token_id)
        own = (job.prefill.attempt, job.grant is not None, *progress)
    else:
        own = (job.attempt, bool(job.unready), bool(job.incomplete), job.is_granted, job.handoff is not None)
    place = sequence and (sequence.hold.block_ids, sequence.num_computed, len(sequence.token_ids))
    return own, hold and hold.block_ids, place
