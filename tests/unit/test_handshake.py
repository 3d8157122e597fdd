"""Two ranks pair up only if their layouts let them: every field, garbage, and other versions."""

import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.frames import FRAME_VERSION
from kv_transfer.handshake import MAX_GREETING_BYTES, greeting, refusal
from protocol.layout import KVLayout, Plane, keys_and_values

OURS = KVLayout("a" * 64, 32, keys_and_values(8, 128, "bfloat16"), 16, 2)

MUST_BE_EQUAL = {"model_hash", "num_layers", "planes"}
MAY_DIFFER = {"block_size": 128, "tensor_parallel": 16}
OTHERS: list[tuple[dict[str, object], str]] = [
    ({"model_hash": "b" * 64}, f"model_hash differs: {'b' * 64} and {'a' * 64}"),
    ({"num_layers": 33}, "num_layers differs: 33 and 32"),
    ({"planes": keys_and_values(4, 128, "bfloat16")}, "differs: 4 x 128 bfloat16 + 4 x 128 bfloat16 and 8 x 128"),
    ({"planes": keys_and_values(8, 64, "bfloat16")}, "differs: 8 x 64 bfloat16 + 8 x 64 bfloat16 and 8 x 128"),
    ({"planes": keys_and_values(8, 128, "float16")}, "differs: 8 x 128 float16 + 8 x 128 float16 and 8 x 128 bfloat16"),
    ({"planes": (Plane(1, 576, "no type"),)}, "differs: 1 x 576 no type and 8 x 128 bfloat16 + 8 x 128 bfloat16"),
    ({"planes": ()}, "differs:  and 8 x 128"),
    ({"planes": OURS.planes * 2}, "KV geometry differs"),
    (
        {"planes": (Plane(8, 128, "bfloat16 + 8 x 128 bfloat16"),)},
        "KV geometry differs",
    ),  # whatever words it is told in
]


def test_every_field_of_a_layout_is_judged():
    assert set(KVLayout.__struct_fields__) == MUST_BE_EQUAL | MAY_DIFFER.keys()
    assert {field for change, _ in OTHERS for field in change} == MUST_BE_EQUAL


@pytest.mark.parametrize(("change", "complaint"), OTHERS)
def test_what_must_be_equal_and_is_not_is_named_with_both_values(change, complaint):
    assert complaint in refusal(OURS, greeting(msgspec.structs.replace(OURS, **change)))


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


numbers = st.integers(0, 2**63 - 1)
planes = st.lists(st.builds(Plane, numbers, numbers, st.text(max_size=9)), max_size=5).map(tuple)


@given(st.builds(KVLayout, st.text(max_size=9), numbers, planes, numbers, numbers))
def test_any_numbers_are_judged_and_never_an_error(theirs):
    assert refusal(OURS, greeting(theirs))


@given(st.integers(-(2**63), 0))
def test_sizes_that_are_none_are_refused_and_never_an_error(tensor_parallel):
    theirs = msgspec.structs.replace(OURS, tensor_parallel=tensor_parallel)
    assert f"split over {tensor_parallel} ranks" in refusal(OURS, greeting(theirs))
