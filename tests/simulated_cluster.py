"""A whole cluster in one thread with no clock: real roles, pools and step loops; simulated ranks, network and router.

The model is an oracle: its next token is a hash of the KV that the block table leads to, and KV of a token is the pair
(token, position). One foreign, stale or misplaced block changes the answer. Everything that could happen next is in a
list, and a seeded generator picks: messages between two ends stay in order, all else may overtake.
"""

import random
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from decode_worker.inbox import LoopbackInbox, RemoteInbox
from decode_worker.role import DecodeRole
from engine.block_pool import BlockPool, Hold
from engine.role import Role
from engine.step_loop import StepLoop
from kv_transfer.transports.loopback import Loopback
from prefill_worker.outbox import LoopbackOutbox, RemoteOutbox
from prefill_worker.role import PrefillRole
from protocol.identity import Attempt, new_attempt
from protocol.layout import Endpoint, KVLayout
from protocol.messages import (
    Abort,
    AnyMessage,
    Committed,
    Failed,
    Grant,
    Handoff,
    Prefill,
    Reserve,
    Tokens,
    TokenUpdate,
)
from protocol.orders import (
    AnyOrder,
    AnyReport,
    Batch,
    DropTransfer,
    ExpectBlocks,
    Expecting,
    Received,
    SendBlocks,
    SendMore,
)
from protocol.request import Request

VOCAB_SIZE = 64
NUM_RANKS = 2
SHARE_OF_FRAMES = 0.03  # frames are slow, so that much happens to a request while its KV is on the way
KV = tuple[int, int]  # token, position


def oracle_token(context: list[KV]) -> int:
    """Return the model's next token after this context."""
    return zlib.crc32(repr(context).encode()) % VOCAB_SIZE


def oracle_answer(request: Request) -> list[int]:
    """Return what an undisturbed run of request draws (greedy, no ending tokens)."""
    tokens = list(request.prompt_token_ids)
    for _ in range(request.sampling.max_tokens):
        tokens.append(oracle_token([(token, position) for position, token in enumerate(tokens)]))
    return tokens[len(request.prompt_token_ids) :]


@dataclass
class Worker:
    """One group: its roles, its pool, and ranks that are dictionaries."""

    cluster: "SimulatedCluster"
    epoch: int
    num_blocks: int
    block_size: int
    kv: dict[int, KV] = field(default_factory=dict)  # slot -> what was written there
    inbox: deque[AnyMessage] = field(default_factory=deque)
    expected: dict[Attempt, ExpectBlocks] = field(default_factory=dict)
    num_arrived: dict[Attempt, int] = field(default_factory=dict)
    sending: dict[Attempt, tuple[SendBlocks, int]] = field(default_factory=dict)  # up to which position it was sent
    reports: deque[AnyReport] = field(default_factory=deque)
    size: int = NUM_RANKS

    def __post_init__(self) -> None:
        self.pool = BlockPool(self.num_blocks, self.block_size)
        layout = KVLayout("model", 1, 2, 4, "float32", self.block_size, NUM_RANKS)
        self.endpoint = Endpoint(self.epoch, layout, "zmq", ("",) * NUM_RANKS)
        self.roles: list[Role] = []

    def play(self, roles: list[Role], batch_tokens: int) -> None:
        self.roles = roles
        self.steps = StepLoop(roles, self.forward, batch_tokens, self.block_size)

    def send(self, message: AnyMessage) -> None:
        self.cluster.to_router.setdefault(self.epoch, deque()).append(message)

    def emit(self, update: TokenUpdate) -> None:
        self.send(Tokens((update,)))

    def slot(self, block_ids: tuple[int, ...], position: int) -> int:
        return block_ids[position // self.block_size] * self.block_size + position % self.block_size

    def forward(self, batch: Batch) -> torch.Tensor:
        tokens, contexts = iter(batch.token_ids), []
        lens = zip(batch.query_lens, batch.context_lens, batch.block_tables, strict=True)
        for query_len, context_len, table in lens:
            for position in range(context_len - query_len, context_len):
                self.kv[self.slot(table, position)] = (next(tokens), position)
            contexts.append([self.kv[self.slot(table, position)] for position in range(context_len)])
        drawn = torch.tensor([oracle_token(contexts[index]) for index in batch.sampled], dtype=torch.long)
        return torch.nn.functional.one_hot(drawn, VOCAB_SIZE).float()

    def order(self, order: AnyOrder) -> None:
        match order:
            case ExpectBlocks():
                self.expected[order.attempt] = order
                self.reports.extend(Expecting(rank, order.attempt) for rank in range(NUM_RANKS))
                self.num_arrived[order.attempt] = 0
            case DropTransfer():
                self.expected.pop(order.attempt, None)
                self.sending.pop(order.attempt, None)
            case SendBlocks():
                assert order.num_computed is not None
                self.send_part(order, order.first_position, order.num_computed)
            case SendMore() if order.attempt in self.sending:
                self.send_part(*self.sending[order.attempt], order.num_computed)

    def send_part(self, order: SendBlocks, first: int, num_computed: int) -> None:
        end = min(max(first, num_computed), order.first_position + order.num_tokens)
        payload = [self.kv[self.slot(order.block_ids, position)] for position in range(first, end)]
        self.sending[order.attempt] = (order, end)
        self.cluster.frames.append((order.attempt, first, payload))

    def arrive(self, attempt: Attempt, first: int, payload: list[KV]) -> None:
        expected = self.expected.get(attempt)
        if expected is None:
            return  # an old transfer: dropped
        for position, kv in enumerate(payload, first):
            self.kv[self.slot(expected.block_ids, position)] = kv
        self.num_arrived[attempt] += len(payload)
        if self.num_arrived[attempt] == expected.num_tokens:
            del self.expected[attempt]
            self.reports.extend(Received(rank, attempt) for rank in range(NUM_RANKS))

    def take_message(self) -> None:
        message = self.inbox.popleft()
        for role in self.roles:
            role.receive(message)

    def take_report(self) -> None:
        report = self.reports.popleft()
        for role in self.roles:
            role.heed(report)


@dataclass
class Client:
    """One request as its client sees it."""

    request: Request
    attempt: Attempt
    tokens: list[int] = field(default_factory=list)
    is_over: bool = False
    failure: Failed | None = None


class SimulatedCluster:
    """num_prefill and num_decode groups (or num_colocated), and a router that only relays."""

    def __init__(self, seed: int, num_blocks: int, block_size: int = 4, batch_tokens: int = 24) -> None:
        self.random = random.Random(seed)
        self.to_router: dict[int, deque[AnyMessage]] = {}
        self.frames: list[tuple[Attempt, int, list[KV]]] = []
        self.workers: dict[int, Worker] = {}
        self.clients: dict[Attempt, Client] = {}
        self._size = (num_blocks, block_size, batch_tokens)

    def add(self, epoch: int, kind: str) -> int:
        num_blocks, block_size, batch_tokens = self._size
        worker = self.workers[epoch] = Worker(self, epoch, num_blocks, block_size)
        worker.play(_roles(kind, worker), batch_tokens)
        return epoch

    def start(self, request: Request, prefill: int, decode: int) -> Client:
        attempt = new_attempt(request.request_id, 0, prefill, decode)
        client = self.clients[attempt] = Client(request, attempt)
        source, destination = self.workers[prefill], self.workers[decode]
        destination.inbox.append(Reserve(attempt, request, source.endpoint))
        source.inbox.append(Prefill(attempt, request, destination.endpoint))
        return client

    def abort(self, client: Client) -> None:
        """What the router does when a client leaves, or when either side failed or finished early."""
        client.is_over = True
        for epoch in {client.attempt.prefill_epoch, client.attempt.decode_epoch}:
            self.workers[epoch].inbox.append(Abort(client.attempt))

    def happen(self) -> bool:
        """Let one thing happen that can. Return False when nothing can."""
        if self.frames and self.random.random() < SHARE_OF_FRAMES:
            return self._deliver_frame()
        possible = self._possible()
        self.random.shuffle(possible)
        has_happened = any(action() for action in possible)
        return has_happened or bool(self.frames) or any(worker.reports for worker in self.workers.values())

    def _possible(self) -> list[Callable[[], bool]]:
        possible: list[Callable[[], bool]] = []
        for worker in self.workers.values():
            if worker.inbox:
                possible.append(lambda w=worker: bool(w.take_message() or True))
            if worker.reports:
                possible.append(lambda w=worker: bool(w.take_report() or True))
            possible.append(worker.steps.step)
        possible += [lambda q=queue: self._relay(q.popleft()) for queue in self.to_router.values() if queue]
        return possible

    def _deliver_frame(self) -> bool:
        attempt, first, payload = self.frames.pop(self.random.randrange(len(self.frames)))
        self.workers[attempt.decode_epoch].arrive(attempt, first, payload)
        return True

    def _relay(self, message: AnyMessage) -> bool:
        match message:
            case Tokens():
                self._take_tokens(message)
            case Failed():
                client = self.clients[message.attempt]
                client.failure = message
                self.abort(client)
            case Grant() | Committed():
                self.workers[message.attempt.prefill_epoch].inbox.append(message)
            case Handoff():
                self.workers[message.attempt.decode_epoch].inbox.append(message)
        return True

    def _take_tokens(self, message: Tokens) -> None:
        for update in message.updates:
            client = self.clients[update.attempt]
            if client.is_over:
                continue
            assert update.index == len(client.tokens), "a token is missing or came twice"
            client.tokens.append(update.token_id)
            if update.finish_reason:
                self.abort(client)


def _roles(kind: str, worker: Worker) -> list[Role]:
    pool, layout = worker.pool, worker.endpoint.layout
    if kind == "prefill":
        return [PrefillRole(pool, RemoteOutbox(pool, worker, layout), worker, "model", 8)]
    if kind == "decode":
        return [DecodeRole(pool, RemoteInbox(worker, layout), worker, "model", 8)]
    loopback: Loopback[Hold] = Loopback()
    return [
        DecodeRole(pool, LoopbackInbox(loopback), worker, "model", 8),
        PrefillRole(pool, LoopbackOutbox(loopback), worker, "model", 8),
    ]
