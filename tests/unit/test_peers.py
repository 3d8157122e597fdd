"""The sender's books under a clock of the test's own: what is sent again, when, and what is given up."""

import pytest
import torch

from kv_transfer.frames import FrameHeader
from kv_transfer.handshake import RefusedError
from kv_transfer.plan import Piece
from kv_transfer.transports.peers import PATIENCE_S, Peers
from kv_transfer.transports.transport import DROPPED, Destination, OutgoingFrame, Settled
from protocol.identity import Attempt

TO = Destination(2, "there")
TIMEOUT_S = 30.0


def frame(number: int, transfer_id: int = 3) -> OutgoingFrame:
    attempt = Attempt("0" * 32, 0, 1, 2, transfer_id)
    header = FrameHeader(attempt, 0, 0, 9, Piece(number, (0, 1), (0, 1), (0, 1), 4), "xxh3", b"", number)
    return OutgoingFrame(TO, header, torch.empty(4, dtype=torch.uint8))


class FakePeer:
    """Takes everything and answers what it is told to."""

    is_open, is_stalled = True, False

    def __init__(self) -> None:
        self.sent: list[tuple[int, int]] = []
        self.due: list[tuple[int, bytes]] = []
        self.fault: Exception | None = None
        self.is_closed = False

    @property
    def numbers(self) -> list[int]:
        return [number for _, number in self.sent]

    def answer(self, number: int) -> None:
        self.due += [(sequence, b"") for sequence, each in self.sent if each == number]

    def send(self, sequence: int, frame: OutgoingFrame) -> OutgoingFrame:
        self.sent.append((sequence, frame.header.number))
        return frame

    def answers(self) -> list[tuple[int, bytes]]:
        if self.fault:
            raise self.fault
        due, self.due = self.due, []
        return due

    def let_go(self, frame: OutgoingFrame) -> None:
        """Nothing is held."""

    def rescue(self, frame: OutgoingFrame) -> OutgoingFrame:
        return frame

    def close(self) -> None:
        self.is_closed = True


class Desk:
    """Books, their clock, every connection so far, and what was settled."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.opened: list[FakePeer] = []
        self.settled: list[Settled] = []
        self.books: Peers[FakePeer] = Peers(self._open, self.settled.append, TIMEOUT_S, lambda: self.now_s)

    def _open(self, first: OutgoingFrame) -> FakePeer:
        self.opened.append(FakePeer())
        return self.opened[-1]

    def serve(self, after_s: float = 0.0) -> None:
        self.now_s += after_s
        self.books.serve()

    def send(self, *numbers: int) -> None:
        for number in numbers:
            self.books.add(frame(number))
        self.serve()

    @property
    def ends(self) -> list[tuple[int, str | None]]:
        return [(each.frame.header.number, each.fault) for each in self.settled]


@pytest.fixture
def desk() -> Desk:
    return Desk()


def test_what_was_not_answered_goes_again_in_order_over_a_fresh_connection_and_before_what_waits(desk: Desk) -> None:
    desk.send(0, 1, 2)
    desk.opened[0].answer(1)
    desk.serve(PATIENCE_S)
    assert len(desk.opened) == 1, "an answer is a reason to wait"
    desk.serve(PATIENCE_S + 0.1)
    assert desk.opened[0].is_closed
    desk.books.add(frame(3))
    desk.serve()
    assert desk.opened[1].numbers == [0, 2, 3]
    for number in (0, 2, 3):
        desk.opened[1].answer(number)
    desk.serve()
    assert desk.ends == [(1, None), (0, None), (2, None), (3, None)]
    assert not desk.books.is_busy


def test_a_silent_receiver_is_tried_at_ever_longer_intervals_and_given_up_once(desk: Desk) -> None:
    desk.send(0)
    opened_at = [0.0]
    while not desk.settled and desk.now_s < 200:
        desk.serve(0.1)
        if len(desk.opened) > len(opened_at):
            opened_at.append(desk.now_s - 100)
    assert opened_at == pytest.approx([0, 1.6, 4.7, 10.8, 22.9], abs=0.2)
    assert desk.now_s - 100 == pytest.approx(TIMEOUT_S, abs=0.3)
    assert [number for number, fault in desk.ends if fault] == [0]
    assert desk.opened[-1].is_closed


def test_a_broken_connection_costs_no_frame_and_is_not_tried_again_at_once(desk: Desk) -> None:
    desk.send(0)
    desk.opened[0].fault = ConnectionResetError("cut")
    desk.serve()
    desk.send(1)
    assert (len(desk.opened), desk.settled) == (1, [])
    desk.serve(PATIENCE_S + 0.1)
    desk.serve()
    assert desk.opened[1].numbers == [0, 1]


def test_a_connection_that_is_not_open_yet_is_left_to_open(desk: Desk) -> None:
    desk.send(0)
    desk.opened[0].is_open = False
    for _ in range(20):
        desk.serve(1.0)
    assert len(desk.opened) == 1
    desk.serve(TIMEOUT_S)
    assert [number for number, _ in desk.ends] == [0], "but not for ever"


def test_who_is_refused_does_not_ask_again(desk: Desk) -> None:
    desk.send(0, 1)
    desk.opened[0].fault = RefusedError("dtype differs")
    desk.serve()
    assert desk.ends == [(0, "there refuses: dtype differs"), (1, "there refuses: dtype differs")]
    desk.serve(100)
    assert len(desk.opened) == 1


def test_what_was_dropped_is_not_sent_again(desk: Desk) -> None:
    desk.send(0)
    desk.books.add(frame(1, transfer_id=4))
    desk.serve()
    desk.opened[0].fault = ConnectionResetError("cut")
    desk.serve()
    desk.books.drop(frame(0).header.attempt)
    assert desk.ends == [(0, DROPPED)]
    desk.serve(PATIENCE_S + 0.1)
    desk.serve()
    assert desk.opened[1].numbers == [1]


def test_a_group_that_is_gone_is_not_tried_again_though_its_connection_had_broken(desk: Desk) -> None:
    desk.send(0)
    desk.opened[0].fault = ConnectionResetError("cut")
    desk.serve()
    desk.books.close_epoch(TO.epoch)
    assert desk.ends == [(0, "the destination group is gone")]
    desk.serve(100)
    assert len(desk.opened) == 1


def test_an_idle_connection_that_breaks_is_replaced_by_the_next_frame_at_once(desk: Desk) -> None:
    desk.send(0)
    desk.opened[0].answer(0)
    desk.serve()
    desk.opened[0].fault = ConnectionResetError("cut")
    desk.serve(1000)
    desk.send(1)
    assert desk.opened[1].numbers == [1]


def test_a_payload_that_cannot_be_read_costs_its_own_frame_only(desk: Desk) -> None:
    def fail() -> bytes:
        raise RuntimeError("the device is gone")

    desk.books.add(frame(0)._replace(digests=fail))
    desk.send(1)
    assert [number for number, fault in desk.ends if fault] == [0]
    assert desk.opened[0].numbers == [1]
