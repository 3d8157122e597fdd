"""The transport "auto": a receiver listens on all that its machine can do, a sender takes the best that reaches it.

Decided for each pair of ranks when its first frame is sent, from the receiver's offers: between GPUs, the GPU's memory
where it reaches and NCCL elsewhere; otherwise shared memory on one host, and TCP. All transports of one end share a
queue, so that KVSender and KVReceiver see a single one.
"""

from collections.abc import Callable, Iterable, Mapping

import torch

from kv_transfer.mailbox import Mailbox
from kv_transfer.transports.offers import join_offers, offers_in
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
    """A SendingTransport over others, best first, that all put into settled.

    "zmq" is one of them and reaches everywhere. reaches: of those that do not reach every receiver that offers them,
    whether they reach this address.
    """

    def __init__(
        self,
        transports: Mapping[str, SendingTransport],
        reaches: Mapping[str, Callable[[str], bool]],
        settled: Mailbox[Settled],
    ) -> None:
        self.settled = settled
        self._transports = transports
        self._reaches = reaches
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
            name = best_of(self._transports, offers_in(destination.address), self._reaches)
            self._chosen[destination] = self._transports[name]
        return self._chosen[destination]


def best_of(names: Iterable[str], offers: Mapping[str, str], reaches: Mapping[str, Callable[[str], bool]]) -> str:
    """Return the first of names that is offered and reaches the receiver; "zmq" when there is none."""
    suiting = (name for name in names if name in offers and (name not in reaches or reaches[name](offers[name])))
    return next(suiting, "zmq")


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
