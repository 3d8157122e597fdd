"""A worker for tests of the router: real sockets and the real protocol, no model and no KV.

Output token i of a prompt is prompt[i % len(prompt)], so every test knows what must come out. One thread per rank.
"""

import threading
import time
from collections import deque

import zmq

from protocol.codec import decode, encode
from protocol.errors import WireError
from protocol.identity import Attempt, new_epoch
from protocol.layout import Endpoint, KVLayout, keys_and_values
from protocol.messages import (
    Abort,
    AnyMessage,
    BlockCounts,
    Committed,
    Fence,
    Grant,
    Handoff,
    Heartbeat,
    Join,
    Manifest,
    Ping,
    Prefill,
    Progress,
    Ready,
    Reserve,
    RoleName,
    Stop,
    TokenLogprobs,
    Tokens,
    TokenUpdate,
    Welcome,
    WorkerInfo,
)
from protocol.request import Request
from tests.members import member

LAYOUT = KVLayout("fake", 2, keys_and_values(2, 8, "float32"), 16, 1)


def expected_tokens(prompt: tuple[int, ...] | list[int], count: int) -> list[int]:
    return [prompt[index % len(prompt)] for index in range(count)]


class FakeWorker:
    """One rank. is_granting and is_prefilling can be set to False to keep requests at a stage."""

    def __init__(
        self,
        control: str,
        role: RoleName,
        group: int = 0,
        rank: int = 0,
        layout: KVLayout = LAYOUT,
        num_tokens: int = 1 << 20,
        step_s: float = 0.0,
        is_assembling: bool = True,
    ) -> None:
        self.epoch = new_epoch()
        self.info = WorkerInfo(role, group, rank, layout.tensor_parallel, self.epoch, 4242, "node-a")
        self.layout, self.num_tokens, self.step_s = layout, num_tokens, step_s
        self.is_granting = self.is_prefilling = True
        self.is_assembling = is_assembling
        self.seen: list[tuple[float, AnyMessage]] = []
        self.ended_by: AnyMessage | None = None
        self.requests: dict[Attempt, Request] = {}
        self.next_index: dict[Attempt, int] = {}
        self._granted: set[Attempt] = set()
        self._control = control
        self._outbox: deque[bytes] = deque()
        self._is_ending = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __enter__(self) -> "FakeWorker":
        return self

    def __exit__(self, *_: object) -> None:
        self.die()

    def die(self) -> None:
        """The connection is gone, without a word."""
        self._is_ending.set()
        self._thread.join(5)

    def say(self, message: AnyMessage, epoch: int | None = None) -> None:
        self._outbox.append(encode(message, self.epoch if epoch is None else epoch))

    def say_bytes(self, data: bytes) -> None:
        self._outbox.append(data)

    def messages(self, kind: type) -> list[AnyMessage]:
        return [message for _, message in list(self.seen) if isinstance(message, kind)]

    # --- its thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        context = zmq.Context()
        socket = member(context, zmq.DEALER)
        info = self.info
        socket.setsockopt(zmq.IDENTITY, f"{info.role}-{info.group}-{info.rank}-{info.epoch:x}".encode())
        socket.connect(self._control)
        self.say(Join(info, "tcp://rendezvous" if info.rank == 0 else None))
        try:
            self._loop(socket)
        finally:
            socket.close(linger=0)
            context.term()

    def _loop(self, socket: "zmq.Socket[bytes]") -> None:
        last_step_s = last_beat_s = 0.0
        while not self._is_ending.is_set() and self.ended_by is None:
            while self._outbox:
                socket.send(self._outbox.popleft())
            if socket.poll(1):
                self._receive(socket.recv())
            now_s = time.monotonic()
            if now_s - last_step_s >= self.step_s:
                last_step_s = now_s
                self._step()
            if now_s - last_beat_s >= 0.1 and info_is_leader(self.info):
                last_beat_s = now_s
                self.say(Heartbeat(BlockCounts(100, 90, 0, 10), len(self.next_index), 0, 7, {"frames_received": 5}))

    def _receive(self, data: bytes) -> None:
        try:
            message = decode(data).message
        except WireError:
            return
        if not isinstance(message, Ping):
            self.seen.append((time.monotonic(), message))
        match message:
            case Welcome():
                self.say(Progress("weights 1 of 1"))
                if info_is_leader(self.info) and self.is_assembling:
                    self.become_ready()
            case Fence() | Stop():
                self.ended_by = message
            case Reserve(attempt, request):
                self.requests[attempt] = request
                if self.is_granting:
                    self.say(Grant(attempt, 0))
            case Prefill(attempt, request):
                self.requests[attempt] = request
                if self.is_prefilling:
                    self._emit(attempt, _first_index(request), num_cached_tokens=1)
            case Grant(attempt):
                self._granted.add(attempt)
                if attempt in self.requests:
                    first = _token_at(self.requests[attempt], _first_index(self.requests[attempt]))
                    self.say(Handoff(attempt, first, Manifest(0, 1, 1, 1)))
            case Handoff(attempt):
                if attempt in self.requests:
                    self.say(Committed(attempt))
                    self.next_index[attempt] = _first_index(self.requests[attempt]) + 1
            case Abort(attempt):
                self.requests.pop(attempt, None)
                self.next_index.pop(attempt, None)

    def become_ready(self) -> None:
        addresses = tuple(f"tcp://kv-{rank}" for rank in range(self.layout.tensor_parallel))
        self.say(Ready(Endpoint(self.epoch, self.layout, "zmq", addresses), self.num_tokens))

    def _step(self) -> None:
        for attempt, index in list(self.next_index.items()):
            self.next_index[attempt] = index + 1
            self._emit(attempt, index)

    def _emit(self, attempt: Attempt, index: int, num_cached_tokens: int = 0) -> None:
        request = self.requests[attempt]
        sampling = request.sampling
        token_id = _token_at(request, index)
        reason = "length" if index + 1 >= sampling.max_tokens else None
        if token_id in sampling.ending_token_ids and index + 1 >= sampling.min_tokens:
            reason = "stop"
        logprobs = None
        if sampling.num_logprobs is not None:
            ids = tuple(range(5, 5 + sampling.num_logprobs))
            logprobs = TokenLogprobs(-0.5, ids, tuple(-0.5 - 0.1 * rank for rank in range(len(ids))))
        update = TokenUpdate(attempt, index, token_id, logprobs, reason, 0 if index else num_cached_tokens)
        self.say(Tokens((update,)))
        if reason is not None:
            self.next_index.pop(attempt, None)
            self.requests.pop(attempt, None)


def _first_index(request: Request) -> int:
    return len(request.generated_token_ids)


def _token_at(request: Request, index: int) -> int:
    return request.prompt_token_ids[index % len(request.prompt_token_ids)]


def info_is_leader(info: WorkerInfo) -> bool:
    return info.rank == 0
