"""Every transport under bad frames and garbage: nothing foreign reaches a cache, and nobody is held up."""

import fcntl
import os
import select
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
import pytest
import torch
import zmq

from kv_transfer.digests import unit_digests
from kv_transfer.handshake import greeting
from kv_transfer.plan import FRAME_BYTES, Part
from kv_transfer.receiver import COUNTERS
from kv_transfer.sender import KVSender
from kv_transfer.transports.offers import offered
from kv_transfer.transports.opening import open_sender
from kv_transfer.transports.slab.factories import host_reach
from kv_transfer.transports.slab.host_slab import NUM_SLOTS
from kv_transfer.transports.slab.wire import (
    GREETING,
    FramePacket,
    Hello,
    encode_answer,
    encode_frame,
    encode_hello,
    new_socket,
)
from kv_transfer.transports.torch.pair import Announcement, encode_announcement
from kv_transfer.transports.transport import OutgoingFrame, SendingTransport, Settled
from protocol.identity import Attempt
from protocol.layout import Endpoint
from protocol.orders import Broken, Received
from tests.integration.kv_groups import (
    HOST,
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


@contextmanager
def talking_to(name: str, address: str) -> Iterator[Callable[[list[bytes]], None]]:
    """Something that sends whatever it likes to a receiver, through a new connection each time where one is lost."""
    if name == "auto":
        name, address = "shm", offered(address, "shm")
    if name == "shm":
        opened: list[socket.socket] = []

        def send(parts: list[bytes]) -> None:
            peer = new_socket()
            opened.append(peer)
            peer.connect(host_reach().name_at(address))
            for part in parts:
                with suppress(OSError):
                    peer.send(part)

        yield send
        for peer in opened:
            peer.close()
        return
    with zmq.Context() as context, context.socket(zmq.DEALER) as peer:
        peer.setsockopt(zmq.LINGER, 0)
        peer.connect(address)
        yield peer.send_multipart


GARBAGE = [
    [b""],
    [b"x"] * 2,
    [b"open", b"\xff" * 40],
    [b"open", msgspec.msgpack.encode([1, 0, HOST, 1, b"\xff" * 40])],
    [b"frame", b"12345678", b"\x01\x00\x00\x00", b"\x01" * 60],
    [b"frame", b"12345678", b"\xff\xff\xff\xff", b"\x01" * 60],
    [b"seq", b"\x01" * 60, b"payload"],
    [b"seq", b"\x02" * 60, b"payload"],
    [b"greeting", b"\x03\x90"],
    [b"a"] * 50,
]


@transports
def test_garbage_on_the_socket_is_counted_and_disturbs_nobody(name):
    with connected(name, timeout_s=1) as (source, sink):
        before = sink.caches[0].clone()
        with talking_to(name, sink.receivers[0].address) as send:
            for parts in GARBAGE * 2:
                send([part for part in parts if part or name not in ("shm", "auto")])
            poll_for([*sink.receivers], 0.5)
            assert sum(sink.counters().values()) >= len(GARBAGE)
            assert torch.equal(sink.caches[0], before)
            assert type(transfer(source, sink, 60)[0]) is Received
            assert sink.is_as_expected()
            assert set(sink.receivers[0].counters) == set(COUNTERS)
            assert sink.counters().get("internal_error", 0) == 0


def slab_like(num_bytes: int, is_sealed: bool) -> int:
    fd = os.memfd_create("slab", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, num_bytes)
    if is_sealed:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd


@pytest.mark.parametrize(("num_bytes", "is_sealed"), [(4096, True), (NUM_SLOTS * FRAME_BYTES, False)])
def test_shared_memory_that_could_vanish_under_its_reader_is_not_accepted(num_bytes, is_sealed):
    with connected("shm") as (source, sink), new_socket() as peer:
        fd = slab_like(num_bytes, is_sealed)
        peer.connect(host_reach().name_at(sink.receivers[0].address))
        socket.send_fds(peer, [encode_hello(Hello(greeting(sink.layout), b""))], [fd])
        os.close(fd)
        poll_until_counted(sink, {"bad_message": 1})
        peer.settimeout(5)
        assert peer.recv(10) == b"", "the connection was closed"
        assert type(transfer(source, sink, 40)[0]) is Received


def test_frames_outside_the_shared_memory_cost_their_sender_the_connection_only():
    with connected("shm") as (source, sink):
        for packet in (FramePacket(0, NUM_SLOTS, 16, b""), FramePacket(0, 0, 0, b""), FramePacket(0, 0, 2**31, b"")):
            with new_socket() as peer:
                fd = slab_like(NUM_SLOTS * FRAME_BYTES, True)
                peer.connect(host_reach().name_at(sink.receivers[0].address))
                socket.send_fds(peer, [encode_hello(Hello(greeting(sink.layout), b""))], [fd])
                os.close(fd)
                peer.settimeout(5)
                assert peer.recv(10) == encode_answer(GREETING, ""), "welcome"
                peer.send(encode_frame(packet))
                with suppress(ConnectionResetError):
                    assert peer.recv(10) == b""
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
        assert type(transfer(source, sink, 60, blocks=([0, 1, 2, 3], [0, 1, 3, 5]))[0]) is Received


def num_open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_descriptors_that_come_with_nothing_are_not_kept():
    with connected("shm") as (source, sink):
        assert type(transfer(source, sink, 40)[0]) is Received
        before = num_open_files()
        for _ in range(5):
            with new_socket() as peer, Path(os.devnull).open() as file:
                peer.connect(host_reach().name_at(sink.receivers[0].address))
                socket.send_fds(peer, [b""], [file.fileno()] * 3)
                peer.settimeout(5)
                assert peer.recv(10) == b"", "the connection was closed"
        assert num_open_files() == before


def test_a_sender_that_opens_a_second_pair_over_its_connection_loses_the_first():
    with connected("gloo") as (_, sink), socket.create_server((HOST, 0)) as mute_store:
        transport = sink.receivers[0]._transport
        first, second = (
            Announcement(5, rank, HOST, mute_store.getsockname()[1], greeting(sink.layout)) for rank in range(2)
        )
        with talking_to("gloo", transport.address) as send:
            send([b"open", encode_announcement(first)])
            wait_until(lambda: transport._pairs)
            [pair] = transport._pairs.values()
            send([b"open", encode_announcement(second)])
            wait_until(lambda: pair not in transport._pairs.values())
        assert not pair.add(None), "it takes nothing any more, and its thread ends"
