"""Threads that do not end: said in the log, and closing goes on without them."""

import logging
import threading
import time

import pytest

from kv_transfer import threads
from kv_transfer.mailbox import Mailbox
from kv_transfer.streams import Afterwards
from kv_transfer.transports.peer_loop import PeerLoop
from kv_transfer.transports.transport import Destination, OutgoingFrame
from tests.unit.test_peers import FakePeer, frame


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads.has_ended, "__defaults__", (0.1,))


def test_a_device_that_hangs_holds_up_neither_callbacks_nor_payloads_when_all_is_closed(caplog):
    hangs = threading.Event()
    afterwards = Afterwards()
    afterwards.call(hangs.wait, lambda: None)

    def hung() -> bytes:
        hangs.wait()
        return b""

    loop = PeerLoop("test", lambda first: PollableFake(), 30.0, Mailbox(0))
    loop.send(frame(0)._replace(destination=Destination(1, "there"), digests=hung))
    time.sleep(0.05)
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        afterwards.close()
        loop.close()
    assert time.monotonic() - began < 2
    assert ["kv-afterwards" in caplog.text, "kv-sender" in caplog.text] == [True, True]
    hangs.set()


class PollableFake(FakePeer):
    pollable = 0

    def send(self, sequence: int, frame: OutgoingFrame) -> OutgoingFrame:
        return frame


def test_threads_that_end_in_time_are_waited_for_without_a_word(caplog):
    afterwards, called = Afterwards(), []
    afterwards.call(lambda: None, lambda: called.append(True))
    afterwards.close()
    assert called == [True]
    assert caplog.text == ""
