"""The transport "auto": a receiver listens on all that its machine can do, a sender takes the best that reaches it.

Decided for each pair of ranks when its first frame is sent, from the receiver's offers: shared memory on one host, TCP
elsewhere. Both transports of one end share a queue, so that KVSender and KVReceiver see a single transport.
"""

from collections.abc import Mapping

import torch

from kv_transfer.mailbox import Mailbox
from kv_transfer.transports.offers import join_offers, offers_in
from kv_transfer.transports.shm_wire import is_reachable
from kv_transfer.transports.transport import (
    Arrival,
    Destination,
    OutgoingFrame,
    ReceivingTransport,
    SendingTransport,
    Settled,
)
from protocol.identity import Attempt, Epoch


class AutomaticSender:
    """A SendingTransport over others that all put into settled. Names are those in offers; "zmq" reaches everywhere."""

    def __init__(self, transports: Mapping[str, SendingTransport], settled: Mailbox[Settled]) -> None:
        self.settled = settled
        self._transports = transports
        self._chosen: dict[Destination, SendingTransport] = {}

    @property
    def counters(self) -> dict[str, int]:
        return {name: count for transport in self._transports.values() for name, count in transport.counters.items()}

    def staging(self, destination: Destination, num_bytes: int) -> torch.Tensor | None:
        return self._for(destination).staging(destination, num_bytes)

    def send(self, frame: OutgoingFrame) -> None:
        self._for(frame.destination).send(frame)

    def drop(self, attempt: Attempt) -> None:
        for transport in self._transports.values():
            transport.drop(attempt)

    def close_peer(self, epoch: Epoch) -> None:
        self._chosen = {key: transport for key, transport in self._chosen.items() if key.epoch != epoch}
        for transport in self._transports.values():
            transport.close_peer(epoch)

    def close(self) -> None:
        for transport in self._transports.values():
            transport.close()

    def _for(self, destination: Destination) -> SendingTransport:
        if destination not in self._chosen:
            self._chosen[destination] = self._transports[best_of(offers_in(destination.address))]
        return self._chosen[destination]


def best_of(offers: Mapping[str, str]) -> str:
    """Return the name of the best transport that is offered and reaches the receiver from here."""
    return "shm" if is_reachable(offers.get("shm", "")) else "zmq"


class AutomaticReceiver:
    """A ReceivingTransport over others, best first, that all put into arrivals."""

    def __init__(self, transports: Mapping[str, ReceivingTransport], arrivals: Mailbox[Arrival]) -> None:
        self.arrivals = arrivals
        self._transports = transports
        self.address = join_offers({name: transport.address for name, transport in transports.items()})

    @property
    def counters(self) -> dict[str, int]:
        all_counters = [transport.counters for transport in self._transports.values()]
        return {name: sum(counters[name] for counters in all_counters) for name in all_counters[0]}

    def close_peer(self, epoch: Epoch) -> None:
        for transport in self._transports.values():
            transport.close_peer(epoch)

    def close(self) -> None:
        for transport in self._transports.values():
            transport.close()
