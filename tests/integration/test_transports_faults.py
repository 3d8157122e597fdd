"""Every transport under bad frames and garbage: nothing foreign reaches a cache, and nobody is held up."""

import fcntl
import os
import random
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import msgspec
import pytest
import torch

from kv_transfer.digests import unit_digests
from kv_transfer.frames import FRAME_VERSION
from kv_transfer.handshake import Caller, Hello, RefusedError
from kv_transfer.plan import FRAME_BYTES, Part
from kv_transfer.receiver import COUNTERS
from kv_transfer.sender import KVSender
from kv_transfer.transports.connected_peer import ConnectedPeer
from kv_transfer.transports.listener import MAX_STRANGERS
from kv_transfer.transports.opening import open_sender
from kv_transfer.transports.slab.host_slab import NUM_SLOTS
from kv_transfer.transports.torch.pair import PairEnd
from kv_transfer.transports.transport import OutgoingFrame, SendingTransport, Settled
from kv_transfer.transports.wire import Announced, encode_frame
from protocol.identity import Attempt
from protocol.layout import Endpoint
from protocol.orders import Broken, Received
from tests.integration.kv_groups import (
    SECRET,
    SMALL_FRAME_BYTES,
    TRANSPORTS,
    Sink,
    Source,
    attempt_between,
    connected,
    expect_order,
    frames_for,
    poll_for,
    poll_until,
    poll_until_counted,
    send_order,
    site_of,
    transfer,
)
from tests.integration.kv_strangers import connected_to, greet, message, said, sockets_at
from tests.integration.router_process import wait_until

torch.set_num_threads(1)
transports = pytest.mark.parametrize("name", TRANSPORTS)


@pytest.fixture(autouse=True)
def _same_random_numbers_every_time() -> None:
    torch.manual_seed(0)


# --- frames that are not what they should be --------------------------------------------------------------------------


@contextmanager
def tampering(name: str) -> Iterator[tuple[Source, Sink, Attempt, list[OutgoingFrame], SendingTransport]]:
    """An expected transfer, its genuine frames, and a transport to send them by hand, in whatever state."""
    with connected(name) as (source, sink):
        attempt = attempt_between(source, sink)
        sink.receivers[0].expect(expect_order(source, attempt, [9, 4, 7, 2], 60))
        transport = open_sender(name, site_of(source.layout, 5))  # type: ignore[arg-type]
        try:
            yield source, sink, attempt, frames_for(source, sink, attempt, [0, 1, 2, 3], 60), transport
        finally:
            transport.close()


def with_header(frame: OutgoingFrame, **changes: object) -> OutgoingFrame:
    return frame._replace(header=msgspec.structs.replace(frame.header, **changes))


def with_attempt(frame: OutgoingFrame, **changes: object) -> OutgoingFrame:
    return with_header(frame, attempt=msgspec.structs.replace(frame.header.attempt, **changes))


def with_piece(frame: OutgoingFrame, **changes: object) -> OutgoingFrame:
    """Another piece of the same size, with digests to match: only the plan can tell that it is wrong."""
    piece = msgspec.structs.replace(frame.header.piece, **changes)
    return with_header(frame, piece=piece, unit_digests=unit_digests("xxh3", piece, frame.payload))


def flipped(frame: OutgoingFrame) -> OutgoingFrame:
    payload = frame.payload.clone()
    payload[100] ^= 1
    return frame._replace(payload=payload)


def cut(frame: OutgoingFrame) -> OutgoingFrame:
    return frame._replace(payload=frame.payload[:-4].clone())


BREAKING: dict[str, Callable[[OutgoingFrame], OutgoingFrame]] = {
    "other tokens": lambda frame: with_piece(frame, tokens=(1, 33)),
    "other heads": lambda frame: with_piece(frame, parts=(Part((1, 3), 32), Part((0, 2), 32))),
    "other layers": lambda frame: with_piece(frame, layers=(1, 2)),
    "another index": lambda frame: with_piece(frame, index=77),
    "another number of frames": lambda frame: with_header(frame, num_frames=1),
    "another source rank": lambda frame: with_header(frame, source_rank=1),
    "another destination rank": lambda frame: with_header(frame, destination_rank=1),
}


@transports
@pytest.mark.parametrize("damage", BREAKING)
def test_a_frame_that_is_not_the_plans_breaks_the_whole_transfer(name, damage):
    with tampering(name) as (_, sink, attempt, frames, transport):
        wrong = BREAKING[damage](frames[0])
        before = sink.caches[0].clone()
        transport.send(wrong)
        (report,) = poll_until([*sink.receivers], 1)
        assert isinstance(report, Broken)
        assert report.attempt == attempt
        assert torch.equal(sink.caches[0], before)
        assert sink.counters() == {"wrong_piece": 1}
        for frame in frames:
            transport.send(frame)
        poll_until_counted(sink, {"wrong_piece": 1, "unknown_attempt": len(frames)})
        assert torch.equal(sink.caches[0], before), "what comes after a transfer broke is not used"


@transports
@pytest.mark.parametrize("damage", [flipped, cut])
def test_a_damaged_frame_is_refused_counted_and_mended_by_a_second_one(name, damage):
    torch.manual_seed(1 + (damage is cut))  # no earlier test may have left the missing bytes where the rest will land
    with tampering(name) as (_, sink, attempt, frames, transport):
        before = sink.caches[0].clone()
        transport.send(damage(frames[0]))
        (fault,) = (settled.fault for settled in settled_of(transport, 1))
        assert fault in ("refused by the receiver: bad_digest", "refused by the receiver: wrong_size")
        assert poll_for([*sink.receivers], 0.1) == []
        assert torch.equal(sink.caches[0], before)
        assert list(sink.counters().values()) == [1]
        assert sink.counters().keys() <= {"bad_digest", "wrong_size"}
        for frame in frames:
            transport.send(frame)
        assert poll_until([*sink.receivers], 1) == [Received(0, attempt)]


def test_a_payload_from_elsewhere_is_sent_over_shm_though_all_staging_is_taken_by_what_waits_behind_it():
    with tampering("shm") as (_, sink, attempt, frames, transport):
        taken = []
        while (room := transport.staging(frames[0].destination, 16)) is not None:
            taken.append(room)
        assert taken
        for frame in frames:
            transport.send(frame)
        assert poll_until([*sink.receivers], 1) == [Received(0, attempt)]
        assert [settled.fault for settled in settled_of(transport, len(frames))] == [None] * len(frames)


def settled_of(transport: SendingTransport, number: int) -> list[Settled]:
    found: list[Settled] = []
    while len(found) < number:
        assert select.select([transport.settled], [], [], 10)[0]
        found += transport.settled.take(1)
    return found


class DamagingTransport:
    """A real SendingTransport behind a wire that flips a bit of so many frames."""

    def __init__(self, transport: SendingTransport, num_damaged: int) -> None:
        self._transport = transport
        self.num_damaged = num_damaged
        self.settled = transport.settled
        self.counters = transport.counters
        self.staging, self.drop, self.close_peer = transport.staging, transport.drop, transport.close_peer
        self.close = transport.close

    def send(self, frame: OutgoingFrame) -> None:
        frame = frame.sealed()
        if self.num_damaged:
            self.num_damaged -= 1
            frame.payload[100] ^= 1
        self._transport.send(frame)


@transports
@pytest.mark.parametrize("num_damaged", [1, 4])
def test_damage_on_the_wire_is_mended_while_prefill_still_holds_the_blocks(name, num_damaged):
    with connected(name, 1, 1) as (source, sink):
        real = open_sender(name, site_of(source.layout, 5))
        source.senders[0].close()
        sender = KVSender(
            source.caches[0].unbind(), source.layout, 0, DamagingTransport(real, num_damaged), SMALL_FRAME_BYTES
        )
        source.senders = [sender]
        assert {type(report) for report in transfer(source, sink, 60)} == {Received}
        assert sink.is_as_expected()
        assert sender.counters["resent_frames"] == num_damaged
        assert sink.counters() == {"bad_digest": num_damaged}


@transports
def test_damage_that_does_not_end_breaks_the_transfer_and_nothing_of_it_is_used(name):
    with connected(name, 1, 1) as (source, sink):
        transport = DamagingTransport(open_sender(name, site_of(source.layout, 5)), 1000)
        sender = KVSender(source.caches[0].unbind(), source.layout, 0, transport, SMALL_FRAME_BYTES)
        attempt, before = attempt_between(source, sink), sink.caches[0].clone()
        sink.receivers[0].expect(expect_order(source, attempt, [1, 2, 3, 4], 60))
        sender.send(send_order(sink, attempt, [1, 2, 3, 4], 60))
        (report,) = poll_until([sender, *sink.receivers], 1)
        assert report == Broken(0, attempt, "refused by the receiver: bad_digest")
        assert torch.equal(sink.caches[0], before)
        transport.num_damaged = 0
        source.senders[0].close()
        source.senders = [sender]
        sink.receivers[0].drop(attempt)
        assert type(transfer(source, sink, 60)[0]) is Received


STALE = {
    "an earlier attempt": {"number": 7},
    "another request": {"request_id": "f" * 32},
    "an earlier life of the sender": {"prefill_epoch": 5},
    "an earlier life of the receiver": {"decode_epoch": 5},
    "another transfer": {"transfer_id": 5},
}


@transports
@pytest.mark.parametrize("identity", STALE)
def test_a_frame_of_any_other_identity_is_dropped_and_the_transfer_goes_on(name, identity):
    with tampering(name) as (_, sink, attempt, frames, transport):
        before = sink.caches[0].clone()
        for frame in frames:
            transport.send(with_attempt(frame, **STALE[identity]))
        poll_until_counted(sink, {"unknown_attempt": len(frames)})
        assert torch.equal(sink.caches[0], before)
        for frame in frames:
            transport.send(frame)
        assert poll_until([*sink.receivers], 1) == [Received(0, attempt)]


@transports
def test_doubled_and_reordered_frames_still_make_one_whole_transfer(name):
    with tampering(name) as (source, sink, attempt, frames, transport):
        kv = torch.zeros(2, 3, 2, 60, 8)
        for position in range(60):
            kv[:, :, :, position] = source.caches[0][:, :, position // 16, :, position % 16]
        sink.note([9, 4, 7, 2], 0, kv)
        for frame in (*frames[:0:-1], *frames[:0:-1], frames[0], frames[0]):
            transport.send(frame)
        assert poll_until([*sink.receivers], 1) == [Received(0, attempt)]
        num_others = len(frames) - 1
        counted = {"duplicate_frame": num_others, "unknown_attempt": 1, "reordered_frame": num_others}
        poll_until_counted(sink, counted)
        assert sink.is_as_expected()


@transports
def test_a_missing_frame_leaves_the_transfer_unfinished(name):
    with tampering(name) as (_, sink, _, frames, transport):
        for frame in frames[1:]:
            transport.send(frame)
        assert poll_for([*sink.receivers], 0.3) == []


@transports
def test_blocks_of_a_dropped_transfer_are_not_written_again(name):
    with tampering(name) as (source, sink, attempt, frames, transport):
        transport.send(frames[0])
        transport.send(frames[0])
        poll_until_counted(sink, {"duplicate_frame": 1})
        sink.receivers[0].drop(attempt)
        other = attempt_between(source, sink)
        sink.receivers[0].expect(expect_order(source, other, [9, 4, 7, 2], 60))
        sink.caches[0].normal_()
        before = sink.caches[0].clone()
        for frame in frames:
            transport.send(frame)
        poll_until_counted(sink, {"duplicate_frame": 1, "unknown_attempt": len(frames)})
        assert torch.equal(sink.caches[0], before)
        for frame in frames:
            transport.send(with_header(frame, attempt=other))
        assert poll_until([*sink.receivers], 1) == [Received(0, other)]


GARBAGE = [
    b"",
    b"x" * 4,
    message(b""),
    message(b"\xff" * 40),
    message(b"tandem-kv" + bytes([FRAME_VERSION]) + b"\xff" * 300),
    message(b"\x01" * 4000),
    message(b"\x01" * 5000),
    b"\xff" * 100_000,
    b"GET / HTTP/1.1\r\nHost: somebody\r\n\r\n",
]


def say(address: str, data: bytes) -> None:
    """Send bytes over a connection of their own and leave."""
    for each in sockets_at(address):
        with connected_to(each) as peer, suppress(OSError):
            peer.sendall(data)
            said(peer), said(peer)


@transports
def test_garbage_on_the_socket_is_counted_and_disturbs_nobody(name):
    with connected(name, timeout_s=1) as (source, sink):
        before = sink.caches[0].clone()
        for data in GARBAGE[2:] * 2:
            say(sink.receivers[0].address, data)
        assert poll_for([*sink.receivers], 0.1) == []
        assert sink.counters()["stranger"] >= 2 * len(GARBAGE[2:])
        assert torch.equal(sink.caches[0], before)
        assert type(transfer(source, sink, 60)[0]) is Received
        assert sink.is_as_expected()
        assert set(sink.receivers[0].counters) == set(COUNTERS)
        assert sink.counters().keys() == {"stranger"}


def test_a_greeting_is_good_for_one_connection_only():
    with connected("zmq") as (source, sink), connected_to(sink.receivers[0].address) as first:
        challenge = said(first)
        caller = Caller(SECRET, Hello(sink.layout, 5, 0))
        hello = caller.hello(challenge)
        first.sendall(message(hello))
        caller.take_verdict(said(first))
        with connected_to(sink.receivers[0].address) as second:
            assert said(second) != challenge
            second.sendall(message(hello))
            with pytest.raises(RefusedError):
                caller.take_verdict(said(second))
            assert said(second) == b"", "what was overheard opens nothing"
        poll_until_counted(sink, {"stranger": 1})
        assert type(transfer(source, sink, 40)[0]) is Received


def test_whoever_connects_and_is_silent_is_turned_away_and_keeps_nobody_out():
    with connected("zmq") as (source, sink), ExitStack() as idle:
        for _ in range(2 * MAX_STRANGERS):
            idle.enter_context(connected_to(sink.receivers[0].address))
        assert type(transfer(source, sink, 40)[0]) is Received
        poll_until_counted(sink, {"stranger": 2 * MAX_STRANGERS})


@transports
def test_a_flood_of_random_bytes_from_peers_that_come_and_go_ends_no_process_and_takes_no_memory(name):
    draws = random.Random(1)
    with connected(name, timeout_s=5) as (source, sink):
        transfer(source, sink, 40)
        files, until = num_open_files(), time.monotonic() + 1.5
        memory = resident_bytes()
        num_sent = 0
        while time.monotonic() < until:
            for address in sockets_at(sink.receivers[0].address):
                with connected_to(address) as peer, suppress(OSError):
                    if draws.random() < 0.5:
                        peer.sendall(message(b"")[: draws.randrange(5)])
                    for _ in range(draws.randrange(20)):
                        peer.sendall(draws.randbytes(draws.choice((1, 10, 1000, 60_000))))
                        num_sent += 1
        assert num_sent > 100
        assert type(transfer(source, sink, 60)[0]) is Received
        assert sink.is_as_expected()
        assert sink.counters().keys() <= {"stranger"}
        assert resident_bytes() - memory < 32 << 20
        wait_until(lambda: num_open_files() <= files + 1)


@transports
def test_a_sender_without_the_clusters_secret_is_refused_by_name(name, monkeypatch):
    with connected(name) as (source, sink):
        monkeypatch.setattr("tests.integration.kv_groups.SECRET", b"another cluster's")
        with connected(name) as (stranger, _):
            attempt = attempt_between(stranger, sink)
            sink.receivers[0].expect(expect_order(stranger, attempt, [1, 2], 32))
            stranger.senders[0].send(send_order(sink, attempt, [1, 2], 32))
            (report,) = poll_until([*stranger.senders, *sink.receivers], 1, deadline_s=3)
            assert isinstance(report, Broken)
            assert "do not have the same cluster's secret" in report.reason
        assert sink.counters().keys() == {"stranger"}
        assert type(transfer(source, sink, 40, blocks=([4, 5, 6], [7, 8, 9]))[0]) is Received


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("name", ["zmq", "shm", "gloo"])
def test_a_frame_that_vanishes_is_sent_again_over_a_fresh_connection(name, monkeypatch):
    sent, owner = [], {"gloo": (PairEnd, "put")}.get(name, (ConnectedPeer, "announce"))
    real = getattr(*owner)

    def lose_the_second(self, *arguments, **options):
        """And over a communicator, where nothing can be left out, all that follow it there."""
        sent.append(self)
        is_lost = len(sent) >= 2 and self is sent[0] if name == "gloo" else len(sent) == 2
        if not is_lost:
            real(self, *arguments, **options)

    with connected(name, timeout_s=4) as (source, sink):
        monkeypatch.setattr(*owner, lose_the_second)
        began = time.monotonic()
        assert {type(report) for report in transfer(source, sink, 60)} == {Received}
        assert 1 <= time.monotonic() - began < 3
        assert sink.is_as_expected()
        opened = [count for key, count in source.senders[0].counters.items() if key.startswith("connections_")]
        assert sum(opened) == 2
        assert source.senders[0].poll() == []


def slab_like(num_bytes: int, is_sealed: bool) -> int:
    fd = os.memfd_create("slab", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, num_bytes)
    if is_sealed:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd


@pytest.mark.parametrize(("num_bytes", "is_sealed"), [(4096, True), (NUM_SLOTS * FRAME_BYTES, False)])
def test_shared_memory_that_could_vanish_under_its_reader_is_not_accepted(num_bytes, is_sealed):
    with connected("shm") as (source, sink), connected_to(sink.receivers[0].address) as peer:
        fd = slab_like(num_bytes, is_sealed)
        caller = greet(peer, sink.layout, fds=(fd,))
        os.close(fd)
        with pytest.raises(RefusedError, match="shared memory is not sealed"):
            caller.take_verdict(said(peer))
        poll_until_counted(sink, {"bad_message": 1, "refused_peer": 1})
        assert said(peer) == b"", "the connection was closed"
        assert type(transfer(source, sink, 40)[0]) is Received


def test_frames_outside_the_shared_memory_cost_their_sender_the_connection_only():
    with connected("shm") as (source, sink):
        for frame in (Announced(0, 16, NUM_SLOTS, b""), Announced(0, 0, 0, b""), Announced(0, 2**31, 0, b"")):
            with connected_to(sink.receivers[0].address) as peer:
                fd = slab_like(NUM_SLOTS * FRAME_BYTES, True)
                greet(peer, sink.layout, fds=(fd,)).take_verdict(said(peer))
                os.close(fd)
                peer.sendall(message(encode_frame(frame)))
                assert said(peer) == b""
        poll_until_counted(sink, {"bad_message": 3})
        assert type(transfer(source, sink, 40)[0]) is Received


@pytest.mark.parametrize("name", ["zmq", "gloo"])
def test_a_member_that_breaks_the_rules_costs_its_own_connection_only(name):
    too_long = struct.pack("<I", 2**31)
    with connected(name) as (source, sink):
        for data in (message(b"\x01" * 10), message(encode_frame(Announced(0, 0, 0, b""))), too_long):
            with connected_to(sink.receivers[0].address) as peer:
                greet(peer, sink.layout).take_verdict(said(peer))
                peer.sendall(data)
                while said(peer):
                    assert name == "gloo", "its pair's, and then the end"
        poll_until_counted(sink, {"bad_message": 3})
        assert type(transfer(source, sink, 40)[0]) is Received


def test_a_receiver_on_another_host_is_refused_by_name():
    with connected("shm") as (source, sink):
        elsewhere = Endpoint(sink.epoch, sink.layout, "shm", ("shm://another-host/tandem-kv-1",))
        attempt = attempt_between(source, sink)
        source.senders[0].send(msgspec.structs.replace(send_order(sink, attempt, [1], 16), destination=elsewhere))
        (report,) = poll_until([*source.senders], 1)
        assert isinstance(report, Broken)
        assert "on another host" in report.reason


def test_a_payload_larger_than_any_frame_costs_its_sender_the_connection_only():
    with tampering("zmq") as (source, sink, _, frames, transport):
        huge = torch.zeros(5 << 20, dtype=torch.uint8)
        transport.send(frames[0]._replace(payload=huge))
        assert poll_for([*sink.receivers], 0.3) == []
        transport.close()
        assert type(transfer(source, sink, 60, blocks=([0, 1, 2, 3], [0, 1, 3, 5]))[0]) is Received


def num_open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_descriptors_that_come_with_nothing_are_not_kept():
    with connected("shm") as (source, sink):
        assert type(transfer(source, sink, 40)[0]) is Received
        before = num_open_files()
        for data in (b"x", message(b"x")):
            for _ in range(5):
                with connected_to(sink.receivers[0].address) as peer, Path(os.devnull).open() as file:
                    said(peer)
                    socket.send_fds(peer, [data], [file.fileno()] * 3)
                    peer.shutdown(socket.SHUT_WR)
                    said(peer)
                    assert said(peer) == b"", "the connection was closed"
        assert num_open_files() == before


def test_a_second_connection_of_the_same_rank_takes_the_place_of_the_first():
    with connected("gloo") as (source, sink):
        with connected_to(sink.receivers[0].address) as first, connected_to(sink.receivers[0].address) as second:
            greet(first, sink.layout).take_verdict(said(first))
            greet(second, sink.layout).take_verdict(said(second))
            assert said(first) == b"", "nobody reads it any more"
        assert type(transfer(source, sink, 40)[0]) is Received
