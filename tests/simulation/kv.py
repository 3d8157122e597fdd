"""KV frames between ranks, as bytes: dropped, doubled, late (so that later ones overtake), flipped; answers too.

Around it everything is production code: KVSender and KVReceiver, the sender's books (transports/peers.py), the checks
of what arrives (transports/intake.py). An address outlives the process behind it: what was sent to one life of a rank
may reach the next one. Connections have one of two shapes: frames that find their way alone, as over TCP and shared
memory, or the torch transports', whose payloads come through a communicator: few at a time and in order, so that after
one that is lost nothing comes any more.
"""

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

from kv_transfer.frames import encode_header
from kv_transfer.staging import HostLanding
from kv_transfer.transports.intake import Intake
from kv_transfer.transports.peers import Peers
from kv_transfer.transports.transport import RECEIVING_FAULTS, Arrival, Destination, OutgoingFrame, Settled
from protocol.identity import Attempt, Epoch
from tests.simulation.clock import Clock

TIMEOUT_S = 4.0
"""Of every single KV operation: how long a sender waits for an answer."""

MAX_UNANSWERED = 6
"""Frames that a connection takes before its queue is full."""

MAX_UNANSWERED_IN_PAIRS = 2
"""The same for a pair with a communicator."""

LOOKS_EVERY_S = 0.1
"""How late a sender looks at the clock, at most."""

ItemT = TypeVar("ItemT")


@dataclass(frozen=True)
class KVFaults:
    """Probabilities per frame."""

    drop: float = 0.0
    double: float = 0.0
    flip: float = 0.0
    late: float = 0.0
    lose_answer: float = 0.0
    late_s: float = 0.3
    latency_s: float = 0.004


class WakingMailbox(Generic[ItemT]):
    """kv_transfer.mailbox.Mailbox for one thread: readable until it is empty, and it wakes whom it belongs to."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._items: deque[tuple[ItemT, int]] = deque()
        self.is_readable = False

    def put(self, item: ItemT, num_bytes: int = 0) -> None:
        self._items.append((item, num_bytes))
        self.ring()

    def take(self, max_bytes: int) -> list[ItemT]:
        taken: list[ItemT] = []
        while self._items and max_bytes > 0:
            item, num_bytes = self._items.popleft()
            taken.append(item)
            max_bytes -= num_bytes
        self.is_readable = bool(self._items)
        return taken

    def ring(self) -> None:
        self.is_readable = True
        self._wake()

    def fileno(self) -> int:
        return -1


@dataclass
class KVNetwork:
    """Which receiver listens at which address, and what happens to frames on their way there.

    in_pairs: whether connections are of the torch transports' shape.
    """

    clock: Clock
    rng: random.Random
    faults: KVFaults = field(default_factory=KVFaults)
    listeners: dict[str, "SimulatedReceiver"] = field(default_factory=dict)
    num_in_flight: int = 0
    in_pairs: bool = False

    def carry(self, peer: "SimulatedPeer", parts: list[bytes]) -> None:
        """Take a frame from a peer; it arrives never, once or twice, sooner or later, whole or not."""
        if self._happens(self.faults.drop):
            peer.is_stuck = self.in_pairs
            return
        if self._happens(self.faults.flip):
            parts = _flipped(parts, self.rng)
        for _ in range(2 if self._happens(self.faults.double) and not self.in_pairs else 1):
            delay_s = self.rng.random() * self.faults.latency_s
            if self._happens(self.faults.late):
                delay_s += self.rng.random() * self.faults.late_s
            if self.in_pairs:
                delay_s = peer.in_order(delay_s)
            self.num_in_flight += 1
            self.clock.after(delay_s, lambda: self._arrive(peer, parts))

    def _arrive(self, peer: "SimulatedPeer", parts: list[bytes]) -> None:
        self.num_in_flight -= 1
        listener = self.listeners.get(peer.address)
        if listener is None:
            return
        fault = listener.take(parts)
        if not self._happens(self.faults.lose_answer):
            answer = [parts[0], (fault or "").encode()]
            self.clock.after(self.rng.random() * self.faults.latency_s, lambda: peer.answered(answer))

    def _happens(self, probability: float) -> bool:
        return probability > 0 and self.rng.random() < probability


def _flipped(parts: list[bytes], rng: random.Random) -> list[bytes]:
    """Return the frame with one bit of header or payload changed."""
    index = rng.choice((1, 2))
    damaged = bytearray(parts[index])
    bit = rng.randrange(8 * len(damaged))
    damaged[bit // 8] ^= 1 << bit % 8
    return [bytes(damaged) if i == index else part for i, part in enumerate(parts)]


class SimulatedReceiver:
    """A ReceivingTransport at an address."""

    def __init__(self, network: KVNetwork, address: str, wake: Callable[[], None]) -> None:
        self._network = network
        self.address = address
        self.arrivals: WakingMailbox[Arrival] = WakingMailbox(wake)
        self.counters: dict[str, int] = dict.fromkeys(RECEIVING_FAULTS, 0)
        self._intake = Intake(self.arrivals, self.counters, HostLanding())  # type: ignore[arg-type]
        network.listeners[address] = self

    def take(self, parts: list[bytes]) -> str | None:
        return self._intake.accept(parts[1], torch.frombuffer(bytearray(parts[2]), dtype=torch.uint8))

    def close_peer(self, epoch: Epoch) -> None:
        """Nothing to do: what a dead one left names an attempt that is over."""

    def close(self) -> None:
        if self._network.listeners.get(self.address) is self:
            del self._network.listeners[self.address]


class SimulatedPeer:
    """A Peer: one connection, which takes so many frames at a time."""

    is_open = True

    def __init__(self, frame: OutgoingFrame, network: KVNetwork, wake: Callable[[], None]) -> None:
        self.address = frame.destination.address
        self.is_stalled = self.is_stuck = False
        self._network = network
        self._wake = wake
        self._answers: deque[tuple[int, bytes]] = deque()
        self._num_under_way = 0
        self._last_arrives_at = 0.0
        self._max_under_way = MAX_UNANSWERED_IN_PAIRS if network.in_pairs else MAX_UNANSWERED
        self._is_closed = False

    def send(self, sequence: int, frame: OutgoingFrame) -> OutgoingFrame | None:
        self.is_stalled = self._num_under_way >= self._max_under_way
        if self.is_stalled:
            return None
        self._num_under_way += 1
        if not self.is_stuck:
            number = sequence.to_bytes(8, "little")
            self._network.carry(self, [number, encode_header(frame.header), frame.payload.numpy().tobytes()])
        return frame

    def in_order(self, delay_s: float) -> float:
        """Return the delay of a frame that overtakes none that was sent before it."""
        now_s = self._network.clock.read()
        self._last_arrives_at = max(self._last_arrives_at, now_s + delay_s)
        return self._last_arrives_at - now_s

    def answers(self) -> list[tuple[int, bytes]]:
        answers = list(self._answers)
        self._answers.clear()
        return answers

    def let_go(self, frame: OutgoingFrame) -> None:
        """Its staging is its own."""

    def rescue(self, frame: OutgoingFrame) -> OutgoingFrame:
        return frame

    def answered(self, answer: list[bytes]) -> None:
        """Let an answer arrive, perhaps for the second time."""
        if not self._is_closed:
            self._num_under_way -= 1
            self._answers.append((int.from_bytes(answer[0], "little"), answer[1]))
            self._wake()

    def close(self) -> None:
        self._is_closed = True


class SimulatedSender:
    """A SendingTransport. What its thread would do is done a moment after it was asked for, in the same order."""

    def __init__(self, network: KVNetwork, wake: Callable[[], None]) -> None:
        self._clock = network.clock
        self._commands: deque[Callable[[], None]] = deque()
        self._is_awake = self._is_closed = self._will_look = False
        self.settled: WakingMailbox[Settled] = WakingMailbox(wake)
        self._peers = Peers(
            lambda frame: SimulatedPeer(frame, network, self._wake_up),
            self.settled.put,
            TIMEOUT_S,
            network.clock.read,
        )

    @property
    def counters(self) -> dict[str, int]:
        return {"connections_simulated": self._peers.num_opened}

    def staging(self, destination: Destination, num_bytes: int) -> torch.Tensor | None:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def send(self, frame: OutgoingFrame) -> None:
        self._command(lambda: self._peers.add(frame))

    def drop(self, attempt: Attempt) -> None:
        self._command(lambda: self._peers.drop(attempt))

    def close_peer(self, epoch: Epoch) -> None:
        self._command(lambda: self._peers.close_epoch(epoch))

    def close(self) -> None:
        self._is_closed = True

    @property
    def is_idle(self) -> bool:
        return not self._commands and not self._peers.is_busy

    def _command(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        self._wake_up()

    def _wake_up(self) -> None:
        if not self._is_awake and not self._is_closed:
            self._is_awake = True
            self._clock.after(0.0002, self._serve)

    def _serve(self) -> None:
        self._is_awake = False
        if self._is_closed:
            return
        while self._commands:
            self._commands.popleft()()
        self._peers.serve()
        if not self.is_idle and not self._will_look:
            self._will_look = True
            self._clock.after(LOOKS_EVERY_S, self._look)

    def _look(self) -> None:
        """See whether it is time to try again, or to give up."""
        self._will_look = False
        self._wake_up()
