"""KVSender over a transport that only records: what it keeps back, and for whom."""

import msgspec
import pytest
import torch

import kv_transfer.sender
from kv_transfer.sender import KVSender
from kv_transfer.transports.loopback import Loopback
from kv_transfer.transports.transport import DROPPED, REFUSED, Settled
from protocol.identity import Attempt, new_attempt
from protocol.layout import Endpoint, keys_and_values
from protocol.orders import Broken, SendBlocks, SendMore
from tests.integration.kv_groups import Recorder, layout, random_caches

FRAME_BYTES = 1024
WINDOW_FRAMES = 3
SHAPE = layout(1, 2)
TARGETS = [Endpoint(epoch, SHAPE, "zmq", (f"tcp://127.0.0.1:{epoch}",)) for epoch in (11, 12)]


@pytest.fixture(autouse=True)
def _small_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_transfer.sender, "WINDOW_BYTES", WINDOW_FRAMES * FRAME_BYTES)


def new_sender() -> tuple[KVSender, Recorder]:
    recorder = Recorder()
    return KVSender(random_caches(SHAPE)[0].unbind(), SHAPE, 0, recorder, FRAME_BYTES), recorder


def order(target: Endpoint, num_tokens: int = 64) -> SendBlocks:
    attempt = new_attempt("0" * 32, 0, 10, target.epoch)
    return SendBlocks(attempt, target, (3, 1, 2, 0), 0, num_tokens)


def counts(recorder: Recorder) -> dict[Attempt, int]:
    attempts = [frame.header.attempt for frame in recorder.frames]
    return {attempt: attempts.count(attempt) for attempt in attempts}


def test_a_destination_never_has_more_than_its_window_and_holds_up_no_other():
    sender, recorder = new_sender()
    slow, fast = order(TARGETS[0]), order(TARGETS[1])
    sender.send(slow)
    sender.send(fast)
    assert counts(recorder) == {slow.attempt: WINDOW_FRAMES, fast.attempt: WINDOW_FRAMES}
    for _ in range(100):
        for frame in [frame for frame in recorder.frames if frame.header.attempt == fast.attempt]:
            recorder.frames.remove(frame)
            recorder.settled.put(Settled(frame, None))
        assert sender.poll() == []
    assert counts(recorder) == {slow.attempt: WINDOW_FRAMES}


def test_every_piece_is_sent_once_as_room_comes_back():
    sender, recorder = new_sender()
    sender.send(order(TARGETS[0]))
    for index in range(24):
        assert [frame.header.piece.index for frame in recorder.frames] == list(range(min(24, index + WINDOW_FRAMES)))
        recorder.settled.put(Settled(recorder.frames[index], None))
        assert sender.poll() == []
    assert recorder.frames[0].header.num_frames == 24


def test_what_was_gathered_is_a_copy_and_what_was_not_is_read_when_its_turn_comes():
    recorder = Recorder()
    cache = random_caches(SHAPE)[0]
    sender = KVSender(cache.unbind(), SHAPE, 0, recorder, FRAME_BYTES)
    sender.send(order(TARGETS[0]))
    payload = recorder.frames[0].payload.clone()
    cache.zero_()
    assert torch.equal(recorder.frames[0].payload, payload)
    recorder.settled.put(Settled(recorder.frames[0], None))
    sender.poll()
    assert not recorder.frames[-1].payload.any()


def test_a_dropped_attempt_makes_room_for_the_next_and_is_not_gathered_any_more():
    sender, recorder = new_sender()
    dropped, kept = order(TARGETS[0]), order(TARGETS[0])
    sender.send(dropped)
    sender.send(kept)
    sender.drop(dropped.attempt)
    assert recorder.dropped == [dropped.attempt]
    for frame in list(recorder.frames):
        recorder.settled.put(Settled(frame, DROPPED))
    assert sender.poll() == []
    assert counts(recorder) == {dropped.attempt: WINDOW_FRAMES, kept.attempt: WINDOW_FRAMES}


def test_a_refused_frame_is_gathered_again_twice_and_then_breaks_its_transfer():
    sender, recorder = new_sender()
    refused = order(TARGETS[0], 16)
    sender.send(refused)
    for number in (1, 2):
        frame = recorder.frames[0]
        recorder.frames.clear()
        recorder.settled.put(Settled(frame, REFUSED + "bad_digest"))
        assert sender.poll() == []
        assert recorder.frames[0].header.piece == frame.header.piece
        assert sender.counters["resent_frames"] == number
    recorder.settled.put(Settled(recorder.frames[0], REFUSED + "bad_digest"))
    assert sender.poll() == [Broken(0, refused.attempt, "refused by the receiver: bad_digest")]


def test_one_failed_frame_breaks_the_transfer_once_and_drops_the_rest():
    sender, recorder = new_sender()
    failing = order(TARGETS[0])
    sender.send(failing)
    for frame in recorder.frames:
        recorder.settled.put(Settled(frame, "wire cut"))
    assert sender.poll() == [Broken(0, failing.attempt, "wire cut")]
    assert recorder.dropped == [failing.attempt]
    assert sender.poll() == []
    assert len(recorder.frames) == WINDOW_FRAMES


def test_a_failed_connection_breaks_all_that_waits_for_it_and_a_refused_frame_does_not():
    sender, recorder = new_sender()
    under_way, waiting, elsewhere = order(TARGETS[0]), order(TARGETS[0]), order(TARGETS[1])
    for each in (under_way, waiting, elsewhere):
        sender.send(each)
    recorder.settled.put(Settled(recorder.frames[0], "no answer"))
    assert {report.attempt for report in sender.poll()} == {under_way.attempt, waiting.attempt}
    assert counts(recorder)[elsewhere.attempt] == WINDOW_FRAMES


def test_a_lost_peer_breaks_its_transfers_only_and_late_news_of_it_is_ignored():
    sender, recorder = new_sender()
    lost, kept = order(TARGETS[0]), order(TARGETS[1])
    sender.send(lost)
    sender.send(kept)
    sender.close_peer(TARGETS[0].epoch)
    assert [report.attempt for report in sender.poll()] == [lost.attempt]
    for frame in list(recorder.frames):
        recorder.settled.put(Settled(frame, None if frame.destination.epoch == 12 else "gone"))
    assert sender.poll() == []
    assert counts(recorder)[kept.attempt] == 2 * WINDOW_FRAMES


def test_a_destination_that_does_not_fit_is_broken_at_once():
    sender, recorder = new_sender()
    other = msgspec.structs.replace(
        TARGETS[0], layout=msgspec.structs.replace(SHAPE, planes=keys_and_values(2, 16, "float32"))
    )
    sender.send(order(other))
    (report,) = sender.poll()
    assert "KV geometry differs: 2 x 8 float32 + 2 x 8 float32 and 2 x 16 float32 + 2 x 16 float32" in report.reason
    sender.send(order(msgspec.structs.replace(TARGETS[0], addresses=())))
    (report,) = sender.poll()
    assert "1 ranks but 0 addresses" in report.reason
    assert recorder.frames == []


def test_a_loopback_offer_is_adopted_once_and_only_by_its_own_attempt():
    loopback: Loopback[list[int]] = Loopback()
    first, second, third = (new_attempt(name * 32, 0, 1, 1) for name in "abc")
    blocks = [1, 2]
    loopback.offer(first, blocks)
    loopback.offer(second, [3])
    loopback.drop(second)
    loopback.drop(third)
    assert loopback.adopt(second) is None
    assert loopback.adopt(first) is blocks
    assert loopback.adopt(first) is None


def test_what_is_computed_leaves_while_the_rest_is_computed_and_every_piece_is_sent_once(monkeypatch):
    monkeypatch.setattr(kv_transfer.sender, "WINDOW_BYTES", 1 << 30)
    sender, recorder = new_sender()
    growing = msgspec.structs.replace(order(TARGETS[0]), num_computed=20)
    sender.send(growing)
    sent = [0]
    for num_computed in (20, 31, 32, 63, 64, 64):
        sender.send_more(SendMore(growing.attempt, num_computed))
        ends = {frame.header.piece.tokens[1] for frame in recorder.frames}
        assert max(ends) == num_computed // 8 * 8  # a frame of this test holds 8 tokens
        sent.append(len(recorder.frames))
    assert sent == [0, 6, 9, 12, 21, 24, 24]
    assert sorted(frame.header.piece.index for frame in recorder.frames) == list(range(24))


def test_a_transfer_that_failed_or_was_dropped_sends_no_more():
    sender, recorder = new_sender()
    failed, dropped = (msgspec.structs.replace(order(TARGETS[0]), num_computed=0) for _ in range(2))
    sender.send(failed)
    sender.send(dropped)
    assert recorder.frames == []
    sender.close_peer(TARGETS[0].epoch)
    sender.drop(dropped.attempt)
    for lost in (failed, dropped):
        sender.send_more(SendMore(lost.attempt, 64))
    assert recorder.frames == []
    assert [report.attempt for report in sender.poll()] == [failed.attempt, dropped.attempt]
