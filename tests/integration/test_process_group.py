"""Process groups over a store on one host: right sums, nothing listening elsewhere, errors in time."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from kernels.process_group import open_group, open_store

HOST = "127.0.0.1"
LOOPBACK = "0100007F"  # as /proc/net/tcp writes 127.0.0.1


def listening_hosts() -> set[str]:
    """The addresses that sockets of this process listen on, as the kernel writes them."""
    links = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            links.append(str(entry.readlink()))
        except OSError:
            continue  # closed meanwhile
    hosts = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in links:
                hosts.add(fields[1].split(":")[0])
    return hosts


def open_ranks(size: int, timeout_s: float = 10) -> list[dist.ProcessGroup]:
    """A group whose ranks are threads of this process, each with a connection of its own to the store."""
    server = open_store(HOST, 0, is_server=True, timeout_s=timeout_s)

    def run(rank: int) -> dist.ProcessGroup:
        store = server if rank == 0 else open_store(HOST, server.port, is_server=False, timeout_s=timeout_s)
        return open_group(store, rank, size, HOST, "cpu", timeout_s)

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(run, range(size)))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_all_ranks_get_the_sum_and_nothing_listens_on_other_interfaces(size):
    groups = open_ranks(size)
    assert listening_hosts() == {LOOPBACK}
    parts = [torch.randn(5, 7, generator=torch.Generator().manual_seed(rank)) for rank in range(size)]
    total = torch.stack(parts).sum(0)
    with ThreadPoolExecutor(size) as threads:
        list(threads.map(lambda pair: pair[0].allreduce([pair[1]]).wait(), zip(groups, parts, strict=True)))
    for part in parts:
        torch.testing.assert_close(part, total)


def test_two_groups_of_one_process_do_not_mix():
    first, second = open_ranks(2), open_ranks(2)
    received = [torch.zeros(3), torch.zeros(3)]
    with ThreadPoolExecutor(4) as threads:
        for group, value in ((first, 1.0), (second, 2.0)):
            threads.submit(lambda group, value: group[0].send([torch.full((3,), value)], 1, 0).wait(), group, value)
        for group, target in zip((second, first), reversed(received), strict=True):
            threads.submit(lambda group, target: group[1].recv([target], 0, 0).wait(), group, target)
    assert [tensor.tolist() for tensor in received] == [[1.0] * 3, [2.0] * 3]


def test_a_rank_that_does_not_come_and_one_that_does_not_answer_are_noticed_in_time():
    store = open_store(HOST, 0, is_server=True, timeout_s=0.5)
    began = time.monotonic()
    with pytest.raises(RuntimeError):
        open_group(store, 0, 2, HOST, "cpu", 0.5)
    groups = open_ranks(2, timeout_s=0.5)
    with pytest.raises(RuntimeError):
        groups[0].allreduce([torch.ones(3)]).wait()
    assert time.monotonic() - began < 5


def num_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def test_closed_groups_leave_no_thread_behind():
    before = num_threads()
    groups = open_ranks(2)
    assert num_threads() > before
    groups.clear()
    deadline = time.monotonic() + 5
    while num_threads() > before and time.monotonic() < deadline:
        threading.Event().wait(0.05)
    assert num_threads() <= before
