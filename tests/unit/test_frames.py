"""The frame codec: whatever the bytes, the outcome is a header or a FrameError with a reason from the closed set."""

import itertools
from typing import get_args

import msgspec
import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transfer.digests import check_payload, unit_digests
from kv_transfer.frames import (
    FRAME_VERSION,
    MAX_HEADER_BYTES,
    DigestKind,
    FrameError,
    FrameFault,
    FrameHeader,
    decode_header,
    encode_header,
)
from kv_transfer.plan import FRAME_BYTES, Part, Piece, frames_of, num_units, plan_transfer
from protocol.identity import Attempt, new_attempt, new_request_id
from protocol.layout import KVLayout, keys_and_values

PAYLOAD = bytes(range(256))
kinds = pytest.mark.parametrize("kind", get_args(DigestKind))


def tensor_of(data: bytes | bytearray) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


counts = st.integers(0, 2**31)
ranges = st.tuples(counts, counts)
parts = st.lists(st.builds(Part, ranges, st.integers(1, 2**31)), max_size=4).map(tuple)
headers = st.builds(
    FrameHeader,
    st.builds(Attempt, st.text(max_size=64), counts, *[st.integers(0, 2**63 - 1)] * 3),
    counts,
    counts,
    st.integers(1, 2**31),
    st.builds(Piece, counts, ranges, parts, ranges, st.integers(1, FRAME_BYTES)),
    st.sampled_from(get_args(DigestKind)),
    st.binary(max_size=64),
)


def some_header(kind: DigestKind = "xxh3") -> FrameHeader:
    piece = Piece(1, (0, 2), (Part((0, 1), 2), Part((0, 1), 2)), (16, 48), len(PAYLOAD))
    digests = unit_digests(kind, piece, tensor_of(PAYLOAD))
    return FrameHeader(new_attempt(new_request_id(), 1, 5, 6), 0, 1, 3, piece, kind, digests)


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


@kinds
def test_a_payload_is_checked_for_size_and_content(kind):
    header = some_header(kind)
    check_payload(header, tensor_of(PAYLOAD))
    with pytest.raises(FrameError) as short:
        check_payload(header, tensor_of(PAYLOAD[:-1]))
    with pytest.raises(FrameError, match="1 of 8 units .* layer 0, plane 0 of KV head 0, tokens 16 to 31") as flipped:
        check_payload(header, tensor_of(b"\x01" + PAYLOAD[1:]))
    assert (short.value.fault, flipped.value.fault) == ("wrong_size", "bad_digest")


def test_digests_of_one_kind_are_not_those_of_another():
    header = msgspec.structs.replace(some_header("words"), digest_kind="xxh3")
    with pytest.raises(FrameError, match="8 of 8 units"):
        check_payload(header, tensor_of(PAYLOAD))


@given(st.sampled_from(get_args(DigestKind)), st.data())
def test_one_flipped_bit_is_found_and_the_unit_it_is_in_is_named(kind, data):
    layers, tokens = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 50))
    first = 16 * data.draw(st.integers(0, 9))
    planes = data.draw(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([4, 4, 12, 20])), min_size=1, max_size=4))
    planes.append((1, 8))  # so that there is something
    units = [
        (
            slot_bytes * min(16, tokens - start),
            f"layer {layer}, plane {plane} of KV head {head}, tokens {first + start}",
        )
        for plane, (heads, slot_bytes) in enumerate(planes)
        for layer in range(5, 5 + layers)
        for head in range(7, 7 + heads)
        for start in range(0, tokens, 16)
    ]
    parts = tuple(Part((7, 7 + heads), slot_bytes) for heads, slot_bytes in planes)
    piece = Piece(0, (5, 5 + layers), parts, (first, first + tokens), sum(size for size, _ in units))
    payload = bytearray(data.draw(st.binary(min_size=piece.num_bytes, max_size=piece.num_bytes)))
    digests = unit_digests(kind, piece, tensor_of(payload))
    header = msgspec.structs.replace(some_header(), piece=piece, digest_kind=kind, unit_digests=digests)
    check_payload(header, tensor_of(payload))
    at = data.draw(st.integers(0, 8 * len(payload) - 1))
    payload[at // 8] ^= 1 << at % 8
    ends = itertools.accumulate(size for size, _ in units)
    where = next(name for end, (_, name) in zip(ends, units, strict=True) if at // 8 < end)
    with pytest.raises(FrameError) as error:
        check_payload(header, tensor_of(payload))
    assert error.value.fault == "bad_digest"
    assert f"1 of {len(units)} units do not match their digests, first {where} to " in str(error.value)


@kinds
@pytest.mark.parametrize("widths", [(8, 8), (16, 4), (8,), (32, 32, 4, 4)])
def test_a_units_digest_is_the_same_however_the_prompt_is_laid_out(kind, widths):
    """One piece of two heads, and pieces of one head or cut elsewhere: equal digests, unit by unit."""
    num_layers, num_heads, num_tokens = 2, 2, 70
    random = np.random.default_rng(0)
    kv = [random.integers(0, 256, (num_layers, num_heads, num_tokens, width), np.uint8) for width in widths]

    def by_unit(heads: tuple[int, int], tokens: tuple[int, int]) -> dict[tuple[int, ...], bytes]:
        payload = np.concatenate([plane[:, slice(*heads), slice(*tokens)].reshape(-1) for plane in kv])
        parts = tuple(Part(heads, width) for width in widths)
        piece = Piece(0, (0, num_layers), parts, tokens, payload.nbytes)
        digests = unit_digests(kind, piece, torch.from_numpy(payload))
        units = itertools.product(
            range(len(widths)), range(num_layers), range(*heads), range(tokens[0] // 16, -(-tokens[1] // 16))
        )
        return {unit: digests[8 * index : 8 * index + 8] for index, unit in enumerate(units)}

    whole = by_unit((0, 2), (0, 70))
    assert whole == by_unit((0, 1), (0, 48)) | by_unit((1, 2), (0, 48)) | by_unit((0, 2), (48, 70))
    assert len(set(whole.values())) == len(whole) == num_layers * len(widths) * num_heads * 5


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": (16, 16)},
        {"tokens": (0, 3)},
        {"layers": (0, 2**31)},
        {"parts": ()},
        {"parts": (Part((0, 0), 2), Part((0, 0), 2))},
        {"parts": (Part((0, 3), 2), Part((3, 2), 2))},
        {"parts": (Part((0, 1), 2), Part((0, 1), 3))},
        {"parts": (Part((0, 1), 2**60), Part((0, 1), 2))},
    ],
)
@kinds
def test_a_header_that_contradicts_itself_is_refused_before_anything_is_computed(change, kind):
    header = some_header(kind)
    header = msgspec.structs.replace(header, piece=msgspec.structs.replace(header.piece, **change))
    with pytest.raises(FrameError) as error:
        check_payload(header, tensor_of(PAYLOAD))
    assert error.value.fault == "bad_header"


@settings(deadline=None)
@given(st.integers(1, 128), st.integers(1, 100), st.integers(1, 2000), st.integers(2, 256), st.integers(1, 2))
def test_every_header_of_a_plan_fits(num_heads, num_layers, num_tokens, head_dim, num_pairs):
    planes = keys_and_values(num_heads, head_dim, "bfloat16") * num_pairs
    shape = KVLayout("m", num_layers, planes, 16, 1)
    (link,) = plan_transfer(shape, shape)
    for piece in frames_of(link, shape, 0, num_tokens):
        header = msgspec.structs.replace(some_header(), piece=piece, unit_digests=bytes(8 * num_units(piece)))
        assert len(encode_header(header)) <= MAX_HEADER_BYTES
