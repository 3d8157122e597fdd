"""WorkerCluster whose ranks are processes, so that they can be killed and stopped; a test starts a lost one again.

They are forked from a server that has imported torch, so that a start takes a fraction of a second. The router's
control plane stays in the test's own process, where every message that passes can be seen.
"""

import multiprocessing
import os
from types import TracebackType
from typing import Any

from protocol.errors import TandemError
from protocol.messages import RoleName
from protocol.request import Request
from router.control.membership import Member
from router.control.policies import Pair
from tests.worker_cluster import WorkerCluster
from worker.launch import WorkerLaunch, decode, encode
from worker.life import run_worker

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["worker.life"])


class ProcessCluster(WorkerCluster):
    """See WorkerCluster. Groups of one rank are addressed by role and number."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._processes: dict[str, Any] = {}
        self._launches: dict[str, WorkerLaunch] = {}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            super().__exit__(kind, error, trace)
        finally:
            for process in self._processes.values():
                process.join(5)
                process.kill()

    def pid(self, role: RoleName, group: int) -> int:
        pid = self._processes[f"{role}-{group}-rank0"].pid
        assert pid is not None
        return pid

    def route_to(self, prefill: int, decode: int) -> None:
        """From now on requests go to these two groups, whatever the router would choose."""

        def choose(request: Request) -> Pair:
            ready = self.controller.membership.ready_groups
            [sender] = [group for group in ready("prefill") if group.group == prefill]
            [receiver] = [group for group in ready("decode") if group.group == decode]
            return Pair(sender, receiver)

        self.controller.dispatcher.choose = choose  # type: ignore[method-assign]

    def leader(self, role: RoleName, group: int) -> Member:
        """Return what the router knows of this group's leader, dead or alive."""
        return self.controller.membership.groups[role, group].ranks[0]

    def start_again(self, *groups: tuple[RoleName, int]) -> None:
        """Make sure that these lives are over, and begin others, as Ray would."""
        for role, group in groups:
            name = f"{role}-{group}-rank0"
            self._processes[name].kill()
            self._processes[name].join(5)
            self._start_rank(self._launches[name])
        self.wait_until_ready()

    def _start_rank(self, launch: WorkerLaunch) -> None:
        process = _context.Process(target=_live, args=(encode(launch),), daemon=True)
        process.start()
        self._launches[launch.name] = launch
        self._processes[launch.name] = process


def _live(encoded: bytes) -> None:
    launch = decode(encoded)
    # NCCL takes several ranks on one GPU only if they seem to be on different hosts.
    os.environ |= {"NCCL_HOSTID": launch.name, "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}
    try:
        run_worker(launch)
    except TandemError:
        os._exit(1)
