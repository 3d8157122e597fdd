"""Two ranks pair up only if both know the cluster's secret and their layouts let them: fields, versions, garbage."""

import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.frames import FRAME_VERSION
from kv_transfer.handshake import MAGIC, MAX_HELLO_BYTES, Caller, Doorkeeper, Hello, RefusedError, StrangerError
from protocol.layout import KVLayout, Plane, keys_and_values

OURS = KVLayout("a" * 64, 32, keys_and_values(8, 128, "bfloat16"), 16, 2)
SECRET = b"the cluster's"

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


def refusal_of(theirs: KVLayout, ours: KVLayout = OURS) -> str:
    """What the sender is told, "" when it is welcome."""
    caller, door = Caller(SECRET, Hello(theirs, 7, 3, b"more")), Doorkeeper(SECRET, ours)
    hello, refusal = door.judge(caller.hello(door.challenge))
    assert hello == Hello(theirs, 7, 3, b"more")
    if not refusal:
        caller.take_verdict(door.verdict(""))
        return ""
    with pytest.raises(RefusedError) as caught:
        caller.take_verdict(door.verdict(refusal))
    assert str(caught.value) == refusal
    return refusal


def test_every_field_of_a_layout_is_judged():
    assert set(KVLayout.__struct_fields__) == MUST_BE_EQUAL | MAY_DIFFER.keys()
    assert {field for change, _ in OTHERS for field in change} == MUST_BE_EQUAL


@pytest.mark.parametrize(("change", "complaint"), OTHERS)
def test_what_must_be_equal_and_is_not_is_named_with_both_values(change, complaint):
    assert complaint in refusal_of(msgspec.structs.replace(OURS, **change))


@pytest.mark.parametrize("field", MAY_DIFFER)
def test_what_may_differ_is_welcome(field):
    assert refusal_of(msgspec.structs.replace(OURS, **{field: MAY_DIFFER[field]})) == ""


def test_every_pair_of_sizes_that_divide_is_welcome_and_no_other():
    for theirs, ours in itertools.product((1, 2, 3, 4, 8, 16, 32), repeat=2):
        sender, receiver = (msgspec.structs.replace(OURS, tensor_parallel=size) for size in (theirs, ours))
        reason = refusal_of(sender, receiver)
        assert ("8 KV heads cannot be split over 3 ranks" in reason) == (3 in (theirs, ours))


def test_another_version_is_refused_with_both_versions_whatever_follows():
    caller, door = Caller(SECRET, Hello(OURS, 7, 3)), Doorkeeper(SECRET, OURS)
    hello = caller.hello(door.challenge)
    other = MAGIC + bytes([FRAME_VERSION + 1]) + hello[len(MAGIC) + 1 : -20]
    _, refusal = door.judge(other)
    with pytest.raises(RefusedError, match=f"sender {FRAME_VERSION + 1}, receiver {FRAME_VERSION}"):
        caller.take_verdict(door.verdict(refusal))


@pytest.mark.parametrize(("theirs", "ours"), [(b"another", SECRET), (SECRET, b"another"), (b"", SECRET)])
def test_without_the_same_secret_neither_side_takes_the_other_for_one_of_its_own(theirs, ours):
    caller, door = Caller(theirs, Hello(OURS, 7, 3)), Doorkeeper(ours, OURS)
    with pytest.raises(StrangerError, match="this cluster's secret"):
        door.judge(caller.hello(door.challenge))
    for reason in ("", "a stranger"):
        with pytest.raises(RefusedError, match="do not have the same cluster's secret"):
            caller.take_verdict(door.verdict(reason))


def test_what_was_said_in_one_greeting_is_worth_nothing_in_another():
    caller, door, other = Caller(SECRET, Hello(OURS, 7, 3)), Doorkeeper(SECRET, OURS), Doorkeeper(SECRET, OURS)
    hello = caller.hello(door.challenge)
    door.judge(hello)
    with pytest.raises(StrangerError):
        other.judge(hello)
    again = Caller(SECRET, Hello(OURS, 7, 3))
    again.hello(door.challenge)
    with pytest.raises(RefusedError):
        again.take_verdict(door.verdict(""))


@given(st.data())
def test_a_hello_in_which_one_bit_has_changed_lets_nobody_in(data):
    caller, door = Caller(SECRET, Hello(OURS, 7, 3)), Doorkeeper(SECRET, OURS)
    hello = bytearray(caller.hello(door.challenge))
    bit = data.draw(st.integers(0, 8 * len(hello) - 1))
    hello[bit // 8] ^= 1 << bit % 8
    try:
        _, refusal = door.judge(bytes(hello))
    except StrangerError:
        return
    assert "version" in refusal


@given(st.binary(max_size=2 * MAX_HELLO_BYTES))
def test_any_bytes_let_nobody_in_and_are_never_an_error_of_another_kind(data):
    for each in (data, MAGIC + data, MAGIC + bytes([FRAME_VERSION]) + data):
        try:
            _, refusal = Doorkeeper(SECRET, OURS).judge(each)
        except StrangerError:
            continue
        assert refusal
    with pytest.raises(RefusedError):
        Caller(SECRET, Hello(OURS, 7, 3)).take_verdict(data)


numbers = st.integers(0, 2**63 - 1)
planes = st.lists(st.builds(Plane, numbers, numbers, st.text(max_size=9)), max_size=5).map(tuple)


@given(st.builds(KVLayout, st.text(max_size=9), numbers, planes, numbers, numbers))
def test_any_numbers_are_judged_and_never_an_error(theirs):
    assert refusal_of(theirs)


@given(st.integers(-(2**63), 0))
def test_sizes_that_are_none_are_refused_and_never_an_error(tensor_parallel):
    theirs = msgspec.structs.replace(OURS, tensor_parallel=tensor_parallel)
    assert f"split over {tensor_parallel} ranks" in refusal_of(theirs)
