"""Workers without models, for benchmarks/router.py: its command is
`python -m benchmarks.router_workers CONTROL ROLE GROUPS TP STEP_MS`.

Groups of TP ranks, every rank with a connection of its own, all in one thread. They answer at once: the first token
when a prompt comes, then a token for everything that runs in every step, all of a group's in one message. Leaders send
heartbeats, followers say that they serve, each four times a second, evenly spread. A group that loses a rank while it
assembles does not come back: then the benchmark waits in vain, as happens with 400 groups on two busy cores.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import cast

import zmq

from protocol.codec import decode, encode
from protocol.identity import Attempt, new_epoch
from protocol.layout import Endpoint, KVLayout, keys_and_values
from protocol.messages import (
    Abort,
    AnyMessage,
    BlockCounts,
    Committed,
    Grant,
    Handoff,
    Heartbeat,
    Join,
    Manifest,
    Prefill,
    Progress,
    Ready,
    Reserve,
    RoleName,
    Tokens,
    TokenUpdate,
    Welcome,
    WorkerInfo,
)
from protocol.request import Request
from protocol.secret import own_secret
from protocol.sockets import prepare_for_members

HEARTBEAT_S = 0.25
MAX_TOKENS = 1 << 30
TOKEN_ID = 300
TURN_MS = 5
JOIN_AT_ONCE = 10
"""Groups: one process cannot shake the hands of many more before ZMQ gives them up."""
_COUNTERS = {f"counter_{index}": index for index in range(20)}
_HEARTBEAT = Heartbeat(BlockCounts(100_000, 90_000, 0, 10_000), 3, 2, 1, _COUNTERS)

Context = zmq.Context["zmq.Socket[bytes]"]


class FakeRank:
    """One rank and its connection."""

    def __init__(self, context: Context, key: bytes, role: RoleName, group: int, rank: int, size: int) -> None:
        self.info = WorkerInfo(role, group, rank, size, new_epoch(), 1, "here")
        self.is_welcome = False
        self.socket = prepare_for_members(context.socket(zmq.DEALER), key, queue=100_000)
        self.socket.setsockopt(zmq.IDENTITY, f"{role}-{group}-{rank}-{self.info.epoch:x}".encode())
        self._beat = encode(Progress("serving") if rank else _HEARTBEAT, self.info.epoch)
        self._requests: dict[Attempt, Request] = {}
        self._running: dict[Attempt, int] = {}  # the next token's index

    def join(self, control: str) -> None:
        self.socket.connect(control)
        self.say(Join(self.info, None if self.info.rank else "here:1"))

    def say(self, message: AnyMessage) -> None:
        self.socket.send(encode(message, self.info.epoch), zmq.NOBLOCK)

    def beat(self) -> None:
        self.socket.send(self._beat, zmq.NOBLOCK)
        if self.info.rank:
            self.receive()

    def receive(self) -> None:
        while self.socket.getsockopt(zmq.EVENTS) & zmq.POLLIN:
            self._take(decode(self.socket.recv()).message)

    def step(self) -> None:
        """Draw a token for everything that runs."""
        if self._running:
            self.say(Tokens(tuple(self._draw(attempt) for attempt in list(self._running))))

    def _draw(self, attempt: Attempt) -> TokenUpdate:
        index = self._running[attempt]
        self._running[attempt] = index + 1
        is_last = index + 1 == self._requests[attempt].sampling.max_tokens
        if is_last:
            self._forget(attempt)
        return TokenUpdate(attempt, index, TOKEN_ID, finish_reason="length" if is_last else None)

    def _take(self, message: AnyMessage) -> None:
        match message:
            case Welcome():
                self.is_welcome = True
            case Reserve(attempt, request):
                self._requests[attempt] = request
                self.say(Grant(attempt, 0))
            case Prefill(attempt, request):
                self.say(Tokens((TokenUpdate(attempt, len(request.generated_token_ids), TOKEN_ID),)))
            case Grant(attempt):
                self.say(Handoff(attempt, TOKEN_ID, Manifest(0, 16, 1, 1)))
            case Handoff(attempt):
                self.say(Committed(attempt))
                self._running[attempt] = len(self._requests[attempt].generated_token_ids) + 1
            case Abort(attempt):
                self._forget(attempt)

    def _forget(self, attempt: Attempt) -> None:
        self._requests.pop(attempt, None)
        self._running.pop(attempt, None)


class FakeGroup:
    """Its ranks, the leader first."""

    def __init__(self, context: Context, key: bytes, role: RoleName, group: int, size: int) -> None:
        self.ranks = [FakeRank(context, key, role, group, rank, size) for rank in range(size)]
        self.is_ready = False

    def get_ready(self) -> None:
        for rank in self.ranks:
            rank.receive()
        self.is_ready = all(rank.is_welcome for rank in self.ranks)
        if self.is_ready:
            leader, size = self.ranks[0], len(self.ranks)
            layout = KVLayout("model", 32, keys_and_values(8, 128, "bfloat16"), 16, size)
            addresses = tuple(f"tcp://here:{rank}" for rank in range(size))
            leader.say(Ready(Endpoint(leader.info.epoch, layout, "zmq", addresses), MAX_TOKENS))


def assemble(control: str, role: RoleName, num_groups: int, size: int) -> list[FakeGroup]:
    """Let all groups join, a few at a time, and say that they are ready."""
    context = zmq.Context()
    context.set(zmq.MAX_SOCKETS, 65_000)
    key = own_secret().key("control")
    groups = [FakeGroup(context, key, role, number, size) for number in range(num_groups)]
    print("made", flush=True)
    sys.stdin.readline()
    for start in range(0, len(groups), JOIN_AT_ONCE):
        _let_join(groups[start : start + JOIN_AT_ONCE], control)
    print("ready", flush=True)
    return groups


def _let_join(groups: Sequence[FakeGroup], control: str) -> None:
    for group in groups:
        for rank in group.ranks:
            rank.join(control)
    while not all(group.is_ready for group in groups):
        time.sleep(0.001)
        for group in groups:
            if not group.is_ready:
                group.get_ready()


def serve(groups: Sequence[FakeGroup], step_s: float) -> None:
    """Beat, step and answer for ever."""
    leaders = [group.ranks[0] for group in groups]
    poller = zmq.Poller()
    for leader in leaders:
        poller.register(leader.socket, zmq.POLLIN)
    beats = _spread([rank for group in groups for rank in group.ranks])
    step_at = time.monotonic()
    while True:
        poller.poll(min(TURN_MS, max(0, int((step_at - time.monotonic()) * 1000))))
        for leader in leaders:
            leader.receive()
        if time.monotonic() >= step_at:
            step_at += step_s
            for leader in leaders:
                leader.step()
        next(beats)


def _spread(ranks: Sequence[FakeRank]) -> Iterator[None]:
    """Let every rank speak once in HEARTBEAT_S, whenever this is asked to go on."""
    began = time.monotonic()
    num_beats = 0
    while True:
        due = int((time.monotonic() - began) / HEARTBEAT_S * len(ranks))
        for index in islice(range(num_beats, due), len(ranks)):
            ranks[index % len(ranks)].beat()
        num_beats = due
        yield


if __name__ == "__main__":
    _, control, role, num_groups, size, step_ms = sys.argv
    serve(assemble(control, cast(RoleName, role), int(num_groups), int(size)), float(step_ms) / 1000)
