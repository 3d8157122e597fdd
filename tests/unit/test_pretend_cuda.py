"""The pretended CUDA device itself: what CUDA refuses is refused, and who is early finds something wrong."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from tests.pretend_cuda.device import PretendCuda, pretended
from tests.pretend_cuda.streams import Waited

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the place of torch.cuda is taken")

SEEDS = range(30)
SIZE = 100


def outcomes(monkeypatch: pytest.MonkeyPatch, program: Callable[[], bool]) -> set[bool]:
    """Return what a program says of its result, over many orders in which streams are served."""
    found = set()
    for seed in SEEDS:
        with pretended(monkeypatch, seed):
            found.add(program())
    return found


def counted_to(number: int) -> Tensor:
    return torch.arange(number, device="cuda")


def is_counted(tensor: Tensor) -> bool:
    return tensor.tolist() == list(range(len(tensor)))


def read_back(is_waiting: bool) -> bool:
    copy = counted_to(SIZE).to("cpu", non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    if is_waiting:
        event.synchronize()
    return is_counted(copy)


def send_up(is_waiting: bool) -> bool:
    buffer = torch.arange(SIZE).pin_memory()
    there = buffer.to("cuda", non_blocking=True)
    if is_waiting:
        torch.cuda.current_stream().synchronize()
    buffer.zero_()
    return is_counted(there)


def fork(is_waiting: bool) -> bool:
    source, aside = counted_to(SIZE), torch.cuda.Stream()
    if is_waiting:
        aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        copy = source.clone()
        aside.synchronize()
        return is_counted(copy)


def let_go(is_recorded: bool) -> bool:
    source, aside = counted_to(SIZE), torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        copy = source.clone()
        if is_recorded:
            source.record_stream(aside)
        del source
        return is_counted(copy)


@pytest.mark.parametrize("program", [read_back, send_up, fork, let_go])
def test_who_is_early_is_found_in_some_order_and_who_waits_in_none(
    program: Callable[[bool], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert outcomes(monkeypatch, partial(program, True)) == {True}
    assert False in outcomes(monkeypatch, partial(program, False))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch):
    with pretended(monkeypatch) as device:
        yield device


WAITS: dict[str, Callable[[Tensor], object]] = {
    "a number is looked at": lambda there: int(there[0]),
    "a list is made": lambda there: there.tolist(),
    "a condition is asked for": lambda there: bool((there > 3).any()),
    "a copy is waited for": lambda there: there.cpu(),
    "a copy to memory that is not pinned": lambda there: torch.empty(SIZE).copy_(there, non_blocking=True),
    "numbers that are made there": lambda there: torch.tensor([1, 2], device=there.device),
    "memory that is not pinned": lambda there: torch.zeros(2).to(there.device, non_blocking=True),
    "a mask as an index": lambda there: there[there > 3],
    "a mask that says what is written": lambda there: there.index_put_((there > 3,), there[:1]),
    "an index of the host": lambda there: there[torch.tensor([1, 2])],
    "a stream is waited for": lambda there: torch.cuda.current_stream().synchronize(),
    "the device is waited for": lambda there: torch.cuda.synchronize(),
}


@pytest.mark.parametrize("name", WAITS)
def test_every_wait_of_the_host_is_found_also_in_a_capture(name: str, cuda: PretendCuda) -> None:
    there = counted_to(SIZE)
    WAITS[name](there)
    with cuda.timeline.no_waiting(), pytest.raises(Waited):
        WAITS[name](there)
    with pytest.raises(RuntimeError, match="capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        WAITS[name](there)


def test_what_needs_no_wait_is_none(cuda: PretendCuda) -> None:
    with cuda.timeline.no_waiting():
        there = torch.arange(SIZE).pin_memory().to("cuda", non_blocking=True)
        there[counted_to(3)] = there[:3] * torch.tensor(2)
        there[5] = 7
        event = torch.cuda.Event()
        event.record()
        torch.cuda.Stream().wait_event(event)
        event.query()


def test_tensors_of_the_host_are_no_operands(cuda: PretendCuda) -> None:
    with pytest.raises(RuntimeError, match="same device"):
        counted_to(SIZE) + torch.arange(SIZE)
    with pytest.raises(ValueError, match="tensor of the host"):
        cuda.launch(torch.neg, torch.zeros(3), results=[])


def test_a_graph_repeats_what_was_launched_on_what_lies_in_its_memory_then(cuda: PretendCuda) -> None:
    source, graph = counted_to(SIZE), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = source * 2 + source.new_ones(SIZE)
    for factor in (1, 5):
        source.copy_(counted_to(SIZE) * factor)
        graph.replay()
        assert result.tolist() == [2 * factor * number + 1 for number in range(SIZE)]
    del source
    graph.replay()
    assert result.tolist() != [2 * 5 * number + 1 for number in range(SIZE)], "it read memory that was let go of"


def test_a_graph_has_no_work_for_other_streams_and_pins_nothing(cuda: PretendCuda) -> None:
    aside = torch.cuda.Stream()
    with pytest.raises(RuntimeError, match="another stream"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        aside.wait_stream(torch.cuda.current_stream())
    with pytest.raises(RuntimeError, match="pinned"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(3).pin_memory()


def test_memory_is_finite_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended(monkeypatch, total_bytes=4096) as cuda:
        first = torch.zeros(700, device="cuda")
        with pytest.raises(torch.OutOfMemoryError):
            torch.zeros(700, device="cuda")
        del first
        second = torch.zeros(900, device="cuda")
        assert torch.cuda.mem_get_info()[0] < 4096
        del second
        torch.cuda.empty_cache()
        assert cuda.allocator.free == 4096
