"""What the decode role adds to every rank of its group: the end that receives KV blocks."""

from collections.abc import Sequence

from kv_transfer.receiver import KVReceiver
from protocol.orders import AnyOrder, AnyReport, ClosePeer, DropTransfer, ExpectBlocks, Expecting, Leaving


class ReceivingMover:
    """See engine.rank.Mover."""

    def __init__(self, receiver: KVReceiver, rank: int) -> None:
        self._receiver = receiver
        self._rank = rank
        self._reports: list[AnyReport] = []

    @property
    def address(self) -> str:
        return self._receiver.address

    def execute(self, order: AnyOrder) -> None:
        match order:
            case ExpectBlocks():
                self._receiver.expect(order)
                self._reports.append(Expecting(self._rank, order.attempt))
            case DropTransfer():
                self._receiver.drop(order.attempt)
            case ClosePeer():
                self._receiver.close_peer(order.epoch)

    def layers_done(self, leaving: Sequence[Leaving], num_layers: int) -> None:
        """What is received does not leave."""

    def poll(self) -> list[AnyReport]:
        reports, self._reports = self._reports, []
        return [*reports, *self._receiver.poll()]

    def filenos(self) -> list[int]:
        return [self._receiver.fileno()]

    def counters(self) -> dict[str, int]:
        return dict(self._receiver.counters)

    def close(self) -> None:
        self._receiver.close()
