"""Two ranks pair up only if their layouts let them: every field, garbage, and other versions."""

import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.frames import FRAME_VERSION
from kv_transfer.handshake import MAX_GREETING_BYTES, greeting, refusal
from protocol.layout import KVLayout

OURS = KVLayout("a" * 64, 32, 8, 128, "bfloat16", 16, 2)

MUST_BE_EQUAL = {
    "model_hash": "b" * 64,
    "num_layers": 33,
    "num_kv_heads": 4,
    "head_dim": 64,
    "dtype": "float16",
}
MAY_DIFFER = {"block_size": 128, "tensor_parallel": 16}


def test_every_field_of_a_layout_is_judged():
    assert set(KVLayout.__struct_fields__) == MUST_BE_EQUAL.keys() | MAY_DIFFER.keys()


@pytest.mark.parametrize("field", MUST_BE_EQUAL)
def test_what_must_be_equal_and_is_not_is_named_with_both_values(field):
    theirs = msgspec.structs.replace(OURS, **{field: MUST_BE_EQUAL[field]})
    reason = refusal(OURS, greeting(theirs))
    assert field in reason
    assert str(MUST_BE_EQUAL[field]) in reason
    assert str(getattr(OURS, field)) in reason


@pytest.mark.parametrize("field", MAY_DIFFER)
def test_what_may_differ_is_welcome(field):
    assert refusal(OURS, greeting(msgspec.structs.replace(OURS, **{field: MAY_DIFFER[field]}))) == ""


def test_every_pair_of_sizes_that_divide_is_welcome_and_no_other():
    for theirs, ours in itertools.product((1, 2, 3, 4, 8, 16, 32), repeat=2):
        sender, receiver = (msgspec.structs.replace(OURS, tensor_parallel=size) for size in (theirs, ours))
        reason = refusal(receiver, greeting(sender))
        assert ("8 KV heads cannot be split over 3 ranks" in reason) == (3 in (theirs, ours))


def test_another_version_is_refused_with_both_versions_whatever_follows():
    for body in (greeting(OURS)[1:], b"", b"\xff" * 40):
        reason = refusal(OURS, bytes([FRAME_VERSION + 1]) + body)
        assert f"sender {FRAME_VERSION + 1}, receiver {FRAME_VERSION}" in reason


@given(st.binary(max_size=2 * MAX_GREETING_BYTES))
def test_any_bytes_are_a_refusal_and_never_an_error(data):
    assert refusal(OURS, data)
    assert refusal(OURS, bytes([FRAME_VERSION]) + data)


@given(st.builds(KVLayout, st.text(max_size=9), *[st.integers()] * 3, st.text(max_size=9), *[st.integers()] * 2))
def test_any_numbers_are_judged_and_never_an_error(theirs):
    assert refusal(OURS, bytes([FRAME_VERSION]) + msgspec.msgpack.encode(to_64_bits(theirs)))


def to_64_bits(layout: KVLayout) -> KVLayout:
    fields = {name: getattr(layout, name) for name in KVLayout.__struct_fields__}
    numbers = {name: value % 2**63 for name, value in fields.items() if isinstance(value, int)}
    return KVLayout(**fields | numbers)
