"""The frame codec: whatever the bytes, the outcome is a header or a FrameError with a reason from the closed set."""

from typing import get_args

import msgspec
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.frames import (
    FRAME_VERSION,
    MAX_HEADER_BYTES,
    FrameError,
    FrameFault,
    FrameHeader,
    check_payload,
    decode_header,
    digest_of,
    encode_header,
)
from kv_transfer.plan import FRAME_BYTES, Piece
from protocol.identity import Attempt, new_attempt, new_request_id

PAYLOAD = bytes(range(256))

counts = st.integers(0, 2**31)
ranges = st.tuples(counts, counts)
headers = st.builds(
    FrameHeader,
    st.builds(Attempt, st.text(max_size=64), counts, *[st.integers(0, 2**63 - 1)] * 3),
    counts,
    counts,
    st.integers(1, 2**31),
    st.builds(Piece, counts, ranges, ranges, ranges, st.integers(1, FRAME_BYTES)),
    st.integers(0, 2**64 - 1),
)


def some_header() -> FrameHeader:
    piece = Piece(1, (0, 2), (0, 1), (16, 32), len(PAYLOAD))
    return FrameHeader(new_attempt(new_request_id(), 1, 5, 6), 0, 1, 3, piece, digest_of(PAYLOAD))


def with_digest(body: bytes, version: int = FRAME_VERSION) -> bytes:
    """A header whose digests are right, whatever its body."""
    return bytes([version]) + xxhash.xxh3_64_intdigest(body).to_bytes(8, "little") + body


def fault_of(data: bytes) -> str | None:
    try:
        decode_header(data)
    except FrameError as error:
        return error.fault
    return None


@given(headers)
def test_a_header_survives_the_wire(header):
    assert decode_header(memoryview(encode_header(header))) == header


@given(st.binary(max_size=2 * MAX_HEADER_BYTES))
def test_any_bytes_are_a_header_or_a_frame_error(data):
    assert fault_of(data) in {None, *get_args(FrameFault)}


@given(st.binary(max_size=400))
def test_any_body_under_a_right_digest_is_a_header_or_a_frame_error(body):
    assert fault_of(with_digest(body)) in {None, "bad_header"}


json_like = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=5) | st.binary(),
    lambda inner: st.lists(inner, max_size=7),
)


@given(st.lists(json_like, max_size=8))
def test_a_well_formed_list_of_anything_is_a_header_or_a_frame_error(fields):
    assert fault_of(with_digest(msgspec.msgpack.encode(fields))) in {None, "bad_header"}


@given(st.data())
def test_one_flipped_bit_anywhere_in_a_header_is_noticed(data):
    encoded = bytearray(encode_header(some_header()))
    bit = data.draw(st.integers(0, 8 * len(encoded) - 1))
    encoded[bit // 8] ^= 1 << bit % 8
    assert fault_of(bytes(encoded)) in {"bad_header", "bad_version"}


@given(st.data())
def test_a_header_that_was_cut_is_noticed(data):
    encoded = encode_header(some_header())
    assert fault_of(encoded[: data.draw(st.integers(0, len(encoded) - 1))]) == "bad_header"


def test_another_version_is_called_by_its_name():
    body = encode_header(some_header())[9:]
    assert fault_of(with_digest(body, version=FRAME_VERSION + 1)) == "bad_version"


@pytest.mark.parametrize("num_bytes", [0, -1, FRAME_BYTES + 1, 2**40])
def test_a_payload_size_that_no_plan_contains_is_refused_with_the_header(num_bytes):
    header = some_header()
    piece = msgspec.structs.replace(header.piece, num_bytes=num_bytes)
    assert fault_of(encode_header(msgspec.structs.replace(header, piece=piece))) == "bad_header"


def test_deep_nesting_and_long_headers_are_refused():
    assert fault_of(with_digest(b"\x91" * (MAX_HEADER_BYTES - 9))) == "bad_header"
    assert fault_of(with_digest(b"\x00" * MAX_HEADER_BYTES)) == "bad_header"


def test_a_payload_is_checked_for_size_and_content():
    header = some_header()
    check_payload(header, PAYLOAD)
    with pytest.raises(FrameError) as short:
        check_payload(header, PAYLOAD[:-1])
    with pytest.raises(FrameError) as flipped:
        check_payload(header, b"\x01" + PAYLOAD[1:])
    assert (short.value.fault, flipped.value.fault) == ("wrong_size", "bad_digest")
