"""What the prefill role adds to every rank of its group: the end that sends KV blocks."""

from collections.abc import Sequence

from kv_transfer.sender import KVSender
from protocol.orders import AnyOrder, AnyReport, ClosePeer, DropTransfer, Leaving, SendBlocks, SendMore


class SendingMover:
    """See engine.rank.Mover."""

    address = ""

    def __init__(self, sender: KVSender) -> None:
        self._sender = sender

    def execute(self, order: AnyOrder) -> None:
        match order:
            case SendBlocks():
                self._sender.send(order)
            case SendMore():
                self._sender.send_more(order)
            case DropTransfer():
                self._sender.drop(order.attempt)
            case ClosePeer():
                self._sender.close_peer(order.epoch)

    def layers_done(self, leaving: Sequence[Leaving], num_layers: int) -> None:
        for each in leaving:
            self._sender.send_more(SendMore(each.attempt, each.num_computed, num_layers))

    def poll(self) -> list[AnyReport]:
        return list(self._sender.poll())

    def filenos(self) -> list[int]:
        return [self._sender.fileno()]

    def counters(self) -> dict[str, int]:
        return dict(self._sender.counters)

    def close(self) -> None:
        self._sender.close()
