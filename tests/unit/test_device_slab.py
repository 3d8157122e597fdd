"""Slabs of a GPU's memory: never lent to a second receiver while the first may read them, and used again afterwards."""

import os

import pytest
import torch

from kv_transfer.transports.slab import device_memory
from kv_transfer.transports.slab.device_slab import DeviceSlabs, open_device_slab
from kv_transfer.transports.slab.host_slab import NUM_SLOTS, Lent

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _memory_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    described: dict[bytes, torch.Tensor] = {}

    def describe(memory: torch.Tensor) -> bytes:
        key = len(described).to_bytes(4, "little")
        described[key] = memory
        return key

    monkeypatch.setattr(device_memory, "describe", describe)
    monkeypatch.setattr(device_memory, "opened", lambda description, *_: described[description])


def lent_to_receiver(slab) -> tuple[object, Lent]:
    """The receiver's end, as if its descriptor had gone through a socket."""
    lent = slab.lend()
    receivers_end = open_device_slab(lent, CPU)
    os.close(lent.fd)
    return receivers_end, lent


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def test_both_ends_see_the_same_bytes():
    slab = DeviceSlabs(CPU).new()
    receivers_end, _ = lent_to_receiver(slab)
    payload = slab.take(100)
    payload[:] = torch.arange(100, dtype=torch.uint8)
    assert torch.equal(receivers_end.slot(slab.index_of(payload), 100), payload)


def test_memory_is_lent_again_when_its_receiver_has_let_go_and_not_before():
    before = num_descriptors()
    slabs = DeviceSlabs(CPU)
    first = slabs.new()
    receivers_end, _ = lent_to_receiver(first)
    memory = first.memory.data_ptr()
    for _ in range(NUM_SLOTS):
        assert first.take(10) is not None
    assert first.take(10) is None
    first.close()
    second = slabs.new()
    assert second.memory.data_ptr() != memory, "its receiver may still read it"
    del receivers_end
    third = slabs.new()
    assert third.memory.data_ptr() == memory
    assert third.take(10) is not None, "all of its slots are free"
    fourth = slabs.new()
    assert fourth.memory.data_ptr() not in (memory, second.memory.data_ptr())
    for slab in (second, third, fourth):
        slab.close()
    assert [slabs.new().memory.data_ptr() for _ in range(3)].count(memory) == 1
    del slabs
    assert num_descriptors() <= before + 3 * 2


def test_a_receiver_that_answers_for_a_slot_still_holds_the_slab():
    slabs = DeviceSlabs(CPU)
    slab = slabs.new()
    receivers_end, _ = lent_to_receiver(slab)
    memory = slab.memory.data_ptr()
    done = (lambda end: lambda: end)(receivers_end)  # as an Arrival's done does
    del receivers_end
    slab.close()
    assert slabs.new().memory.data_ptr() != memory
    del done
    assert slabs.new().memory.data_ptr() == memory


@pytest.mark.parametrize("error", [RuntimeError("invalid device ordinal"), ValueError("GPU memory of 3 bytes")])
def test_memory_that_cannot_be_opened_is_an_error_with_its_reason_and_leaves_nothing_open(error, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(device_memory, "opened", fail)
    slab = DeviceSlabs(CPU).new()
    lent = slab.lend()
    before = num_descriptors()
    with pytest.raises((OSError, ValueError), match=str(error)):
        open_device_slab(lent, CPU)
    assert num_descriptors() == before
    os.close(lent.fd)
    slab.close()


@pytest.mark.parametrize("description", [b"", b"\xc1", b"\x93\x01\x02\x03", b"\x97" + b"\xc4\x00" * 7])
def test_a_description_that_is_none_is_refused_before_cuda_hears_of_it(description, monkeypatch):
    monkeypatch.undo()
    with pytest.raises(ValueError, match="does not parse"):
        device_memory.opened(description, 64, torch.device("cuda", 0))
