"""WorkerCluster whose ranks are processes, so that they can be killed and stopped; a test starts a lost one again.

They are forked from a server that has imported torch, so that a start takes a fraction of a second. The router's
control plane stays in the test's own process, where every message that passes can be seen.
"""

import multiprocessing
import os
import signal
import time
from types import TracebackType
from typing import Any

from protocol.errors import TandemError
from protocol.messages import RoleName, TokenUpdate
from protocol.request import Request
from router.control.dispatch import NoPair
from router.control.membership import Member
from router.control.policies import Pair
from tests.worker_cluster import WorkerCluster
from worker.control_link import ControlLink
from worker.launch import WorkerLaunch, decode, encode
from worker.life import run_worker

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["worker.life"])


class ProcessCluster(WorkerCluster):
    """See WorkerCluster. Groups are addressed by role and number."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._processes: dict[str, Any] = {}
        self._launches: dict[str, WorkerLaunch] = {}
        self.last_tokens: dict[tuple[RoleName, int], int] = {}
        """Groups whose next life ends, as if it were killed, when it has sent a token of this index."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            super().__exit__(kind, error, trace)
        finally:
            for process in self._processes.values():
                process.join(5)
                process.kill()

    def pid(self, role: RoleName, group: int, rank: int = 0) -> int:
        pid = self._processes[f"{role}-{group}-rank{rank}"].pid
        assert pid is not None
        return pid

    def route_to(self, prefill: int, decode: int) -> None:
        """From now on requests go to these two groups, whatever the router would choose."""

        def choose(request: Request, **wishes: object) -> Pair:
            groups = self.controller.membership.groups
            sender, receiver = groups["prefill", prefill].ready, groups["decode", decode].ready
            if sender is None or receiver is None:
                raise NoPair("one of the two is lost")
            return Pair(sender, receiver)

        self.controller.dispatcher.choose = choose  # type: ignore[method-assign]

    def leader(self, role: RoleName, group: int) -> Member:
        """Return what the router knows of this group's leader, dead or alive."""
        return self.controller.membership.groups[role, group].ranks[0]

    def kill(self, role: RoleName, group: int, rank: int = 0) -> None:
        """Kill a rank's process, and wait until it is gone."""
        process = self._processes[f"{role}-{group}-rank{rank}"]
        process.kill()
        process.join(5)

    def start_again(self, *groups: tuple[RoleName, int]) -> None:
        """Make sure that these lives are over, and begin others, as Ray would; return when those serve."""
        over = {member.info.epoch for group in groups for member in self.controller.membership.groups[group].living}
        for launch in list(self._launches.values()):
            if (launch.role, launch.group) in groups:
                self.kill(launch.role, launch.group, launch.rank)
                self._start_rank(launch)
        self.wait_until(lambda: not any(map(self.controller.membership.is_alive, over)))
        self.wait_until_ready()

    def revive(self) -> None:
        """Begin the next life of every rank whose process is gone, as Ray would, and wait until all serve."""
        deadline = time.monotonic() + 60
        while not self.are_all_ready():
            self.begin_missing()
            assert time.monotonic() < deadline, "not all came back"
            time.sleep(0.02)

    def begin_missing(self) -> None:
        """Begin the next life of every rank whose process is gone, or that the router has given up."""
        for launch in list(self._launches.values()):
            if self._is_given_up(launch):
                self.kill(launch.role, launch.group, launch.rank)
            if not self._processes[launch.name].is_alive():
                self._start_rank(launch)

    def _is_given_up(self, launch: WorkerLaunch) -> bool:
        """Whether the router has buried the life that this process is."""
        member = self.controller.membership.groups[launch.role, launch.group].ranks.get(launch.rank)
        pid = self._processes[launch.name].pid
        return member is not None and not member.is_alive and member.info.pid == pid

    def are_all_ready(self) -> bool:
        are_alive = all(process.is_alive() for process in self._processes.values())
        return are_alive and self._num_ready() == self._num_ranks

    def _start_rank(self, launch: WorkerLaunch) -> None:
        last_token = self.last_tokens.get((launch.role, launch.group))
        process = _context.Process(target=_live, args=(encode(launch), last_token), daemon=True)
        process.start()
        self._launches[launch.name] = launch
        self._processes[launch.name] = process


def _live(encoded: bytes, last_token: int | None) -> None:
    launch = decode(encoded)
    if last_token is not None:
        _end_after(last_token)
    # NCCL takes several ranks on one GPU only if they seem to be on different hosts.
    os.environ |= {"NCCL_HOSTID": launch.name, "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}
    try:
        run_worker(launch)
    except TandemError:
        os._exit(1)


def _end_after(index: int) -> None:
    """End this process with the first token of this index, a moment after it has left."""
    emit = ControlLink.emit

    def emit_and_end(link: ControlLink, update: TokenUpdate) -> None:
        emit(link, update)
        if update.index == index:
            link.flush()
            time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGKILL)

    ControlLink.emit = emit_and_end  # type: ignore[method-assign]
