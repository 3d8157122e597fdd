"""One worker process, from joining to its end: one rank of one group.

    join the router -> find the group -> load the weights -> serve requests (the leader) or orders (a follower) -> end

Called by the Ray actor, and by tests that run ranks as threads of one process. Scheduling is the roles' business,
computing the engine's; here is only the order in which things happen.
"""

import os
import socket
from contextlib import ExitStack
from dataclasses import replace

import torch
import zmq

from decode_worker.running import Growth
from engine.block_pool import BlockPool
from engine.group import Follower, GroupRanks, Leader, Place
from engine.sampler import Sampler
from engine.step_loop import StepLoop
from kernels.heap import keep_freed_memory
from models.tensor_parallel import TensorParallel
from protocol.identity import new_epoch
from protocol.layout import Endpoint
from protocol.memory_size import parse_memory
from protocol.messages import Join, Progress, Ready, Welcome, WorkerInfo
from protocol.orders import Enlist
from protocol.topology import DecodeSection, PrefillSection
from worker.assembly import ASSEMBLIES, LeaderParts
from worker.control_link import ControlLink, ControlSocket, Stopped
from worker.dead_man_switch import CLOSE_WITHIN_S, FAILED_CLOSE_WITHIN_S, START_SILENCE_S, DeadManSwitch
from worker.departure import Departure
from worker.launch import WorkerLaunch
from worker.loading import LoadedRank, load_rank
from worker.loops import FollowerLoop, LeaderLoop


def run_worker(launch: WorkerLaunch, switch: DeadManSwitch | None = None, departure: Departure | None = None) -> None:
    """Live one life of a worker; return when the router says stop.

    switch ends the process when it hangs, departure when a signal asks for it; a rank that is a thread has neither.
    Raises ConfigError for a model that cannot be served, another TandemError when this life must end at once.
    """
    torch.set_num_threads(max(1, int(launch.role_section.cpus)))
    if launch.device == "cpu":
        keep_freed_memory()
    switch = switch or DeadManSwitch()
    try:
        with ExitStack() as cleanup:
            switch.allow(START_SILENCE_S)
            _live(WorkerLife(launch, cleanup, switch, departure or Departure()), switch)
    finally:
        switch.disarm()


def _live(worker: "WorkerLife", switch: DeadManSwitch) -> None:
    """Live until Stopped, or raise what else has ended this life; what is closed afterwards has its deadline then."""
    try:
        worker.live()
    except Stopped:
        switch.allow(CLOSE_WITHIN_S)
    except BaseException:
        switch.allow(FAILED_CLOSE_WITHIN_S)
        raise


class WorkerLife:
    """One life; everything that it opens is closed by cleanup, last opened first."""

    def __init__(self, launch: WorkerLaunch, cleanup: ExitStack, switch: DeadManSwitch, departure: Departure) -> None:
        self._launch = launch
        self._cleanup = cleanup
        self._switch = switch
        self._departure = departure
        self._info = _describe(launch)
        self._place = Place(launch.rank, self._info.tensor_parallel, launch.host, launch.device)
        self._socket = ControlSocket(launch.control, self._info, launch.secret)
        cleanup.callback(self._socket.close)
        self._link = ControlLink(self._socket, self._info.epoch)

    def live(self) -> None:
        """Raise what ends this life: Stopped when all is well."""
        if self._launch.rank == 0:
            self._lead()
        else:
            self._follow()

    def _lead(self) -> None:
        """Be rank 0: assemble the group, then serve requests."""
        leader = Leader(self._place, self._launch.secret)
        self._cleanup.callback(leader.close)
        self._join(leader.rendezvous)
        loaded = self._load(leader.connect())
        addresses = (loaded.rank.mover.address, *leader.await_followers(self._link.receive))
        self._serve(loaded, leader, addresses)

    def _follow(self) -> None:
        """Be any other rank: find the leader, then carry out its orders."""
        follower = Follower(self._place, self._join(None).rendezvous, self._launch.secret)
        self._cleanup.callback(follower.close)
        loaded = self._load(follower.connect())
        follower.report(Enlist(self._launch.rank, self._info.epoch, loaded.rank.mover.address))
        wakers: list[zmq.Socket[bytes] | int] = [self._socket.pollable, follower.pollable, *loaded.rank.mover.filenos()]
        self._switch.serve(loaded.longest_gap_s)
        FollowerLoop(self._link, follower, loaded.rank, come_round=self._come_round).run(wakers)

    def _join(self, rendezvous: str | None) -> Welcome:
        self._link.send(Join(self._info, rendezvous))
        self._link.flush()
        return self._link.await_welcome()

    def _load(self, tensor_parallel: TensorParallel) -> LoadedRank:
        loaded = load_rank(self._launch, tensor_parallel, self._tell, self._switch.pulse)
        self._cleanup.callback(loaded.rank.mover.close)
        return loaded

    def _tell(self, doing: str) -> None:
        self._switch.allow(START_SILENCE_S)
        self._link.send(Progress(doing))
        self._link.flush()

    def _serve(self, loaded: LoadedRank, leader: Leader, addresses: tuple[str, ...]) -> None:
        section, cache = self._launch.role_section, self._launch.kv_cache
        assembly, engine = ASSEMBLIES[self._launch.role], loaded.engine
        ranks = GroupRanks(self._place.size, leader, loaded.rank)
        pool = BlockPool(engine.kv_cache.num_blocks, cache.block_size, cache.prefix_caching)
        roles = assembly.roles(self._parts(loaded, pool, ranks))
        draw = Sampler(engine.vocab_size, engine.device).draw
        steps = StepLoop(
            roles, ranks.forward, draw, section.batch_tokens, cache.block_size, is_ahead=engine.is_asynchronous
        )
        endpoint = Endpoint(self._info.epoch, loaded.layout, assembly.transport(self._launch), addresses)
        self._link.send(Ready(endpoint, pool.num_blocks * cache.block_size))
        wakers: list[zmq.Socket[bytes] | int] = [self._socket.pollable, leader.pollable, *loaded.rank.mover.filenos()]
        self._switch.serve(loaded.longest_gap_s)
        LeaderLoop(self._link, ranks, roles, steps, pool, come_round=self._come_round).run(wakers)

    def _come_round(self) -> None:
        self._switch.pulse()
        self._departure.turn(self._link)

    def _parts(self, loaded: LoadedRank, pool: BlockPool, ranks: GroupRanks) -> LeaderParts:
        section = self._launch.role_section
        parts = LeaderParts(
            pool,
            ranks,
            self._link,
            loaded.layout,
            section.batch_requests,
            min_fetch_tokens=self._launch.kv_transfer.min_fetch_tokens,
        )
        match section:
            case PrefillSection():
                return replace(parts, outbox_share=section.outbox_share)
            case DecodeSection():
                max_parked_blocks = parse_memory(section.parked_memory) // loaded.layout.block_bytes
                return replace(parts, growth=Growth(section.growth_tokens, max_parked_blocks))


def _describe(launch: WorkerLaunch) -> WorkerInfo:
    return WorkerInfo(
        role=launch.role,
        group=launch.group,
        rank=launch.rank,
        tensor_parallel=launch.role_section.tensor_parallel,
        epoch=new_epoch(),
        pid=os.getpid(),
        node=socket.gethostname(),
    )
