"""PeerLoop with peers that stall at random: who sends a frame, the caller or the thread, changes nothing else."""

import os
import random
import select
import threading
import time

import pytest
import torch

from kv_transfer.frames import FrameHeader
from kv_transfer.mailbox import Mailbox
from kv_transfer.plan import Piece
from kv_transfer.staging import Digests
from kv_transfer.transports.peer_loop import PeerLoop
from kv_transfer.transports.peers import Peers
from kv_transfer.transports.transport import Destination, OutgoingFrame, Settled
from protocol.identity import Attempt

ATTEMPT = Attempt("0" * 32, 0, 1, 2, 3)
NUM_FRAMES = 300


class StallingPeer:
    """Takes frames in order, stalls now and then, and answers for what it has taken a little later."""

    is_open = True

    def __init__(self, seed: int, sent: list[int]) -> None:
        self.is_stalled = False
        self.pollable = os.eventfd(0, os.EFD_NONBLOCK)
        self._random = random.Random(seed)
        self._sent = sent
        self._unanswered: list[int] = []

    def send(self, sequence: int, frame: OutgoingFrame) -> OutgoingFrame | None:
        self.is_stalled = self._random.random() < 0.3
        if self.is_stalled:
            return None
        time.sleep(0)  # let the other thread in
        self._sent.append(frame.header.number)
        self._unanswered.append(sequence)
        os.eventfd_write(self.pollable, 1)
        return frame

    def answers(self) -> list[tuple[int, bytes]]:
        try:
            os.eventfd_read(self.pollable)
        except BlockingIOError:
            return []
        answered, self._unanswered = self._unanswered, []
        return [(sequence, b"") for sequence in answered]

    def let_go(self, frame: OutgoingFrame) -> None:
        """Nothing is held."""

    def rescue(self, frame: OutgoingFrame) -> OutgoingFrame:
        return frame

    def close(self) -> None:
        os.close(self.pollable)


def late_digests() -> bytes:
    assert threading.current_thread() is not threading.main_thread(), "the main thread waits for a payload"
    return b"late"


def frame(destination: Destination, number: int, digests: Digests) -> OutgoingFrame:
    header = FrameHeader(ATTEMPT, 0, 0, NUM_FRAMES, Piece(number, (0, 1), (0, 1), (0, 1), 4), "xxh3", b"", number)
    return OutgoingFrame(destination, header, torch.empty(4, dtype=torch.uint8), digests)


@pytest.mark.parametrize("seed", range(20))
def test_frames_leave_in_order_and_are_settled_once_whichever_thread_sends_them(seed: int) -> None:
    draws, settled, num_at_once = random.Random(seed), Mailbox[Settled](0), 0
    heard: list[Settled] = []
    sent: dict[Destination, list[int]] = {Destination(epoch, "somewhere"): [] for epoch in (1, 2)}
    loop = PeerLoop("test", lambda frame: StallingPeer(seed, sent[frame.destination]), 30.0, settled)
    for number in range(NUM_FRAMES):
        for destination in sent:
            slow = draws.random() < 0.2
            each = frame(destination, number, late_digests if slow else b"whole")
            if loop.send_at_once(each):
                assert not slow
                num_at_once += 1
            else:
                loop.send(each)
        if draws.random() < 0.3 or number == NUM_FRAMES - 1:
            while len(heard) < 2 * (number + 1) and select.select([settled], [], [], 10)[0]:
                heard += settled.take(1)
    loop.close()
    assert 0 < num_at_once < 2 * NUM_FRAMES
    for destination, numbers in sent.items():
        assert numbers == list(range(NUM_FRAMES))
        assert sorted(each.frame.header.number for each in heard if each.frame.destination == destination) == numbers
    assert all(each.fault is None for each in heard)


def test_a_frame_overtakes_none_that_waits_and_opens_no_connection() -> None:
    sent: list[int] = []
    to = Destination(1, "somewhere")
    peers = Peers(lambda frame: StallingPeer(0, sent), lambda settled: None, 30.0, time.monotonic)
    assert not peers.send_at_once(frame(to, 0, b"whole")), "to connect may take a while"
    peers.add(frame(to, 0, late_digests))
    assert not peers.send_at_once(frame(to, 1, b"whole"))
    assert sent == []
    peers.close()
