"""A start that leads nowhere ends with an error that says whom it waited for; one that goes on is let alone."""

import pytest

from cluster.start_watch import BACK_WITHIN_S, JOIN_WITHIN_S, MAX_LIVES, NO_STATUS_FOR_S, SILENT_FOR_S, StartWatch
from cluster.status_client import ClusterStatus, WorkerStatus
from protocol.errors import TandemError
from protocol.messages import RoleName, WorkerState
from protocol.topology import DecodeSection, KVTransferSection, PrefillSection
from tests.members import SECRET
from tests.simulation.clock import Clock
from worker.launch import CacheLaunch, ModelLaunch, WorkerLaunch

CONTROL = "tcp://10.0.0.1:4321"
LOOK_EVERY_S = 20.0


def launch(role: RoleName) -> WorkerLaunch:
    return WorkerLaunch(
        role=role,
        group=0,
        rank=0,
        model=ModelLaunch("model", "float32", 64),
        role_section=PrefillSection() if role == "prefill" else DecodeSection(),
        kv_cache=CacheLaunch(1 << 20, 0.0, 16, True),
        kv_transfer=KVTransferSection(),
        device="cpu",
        control=CONTROL,
        secret=SECRET,
    )


def worker(role: RoleName, state: WorkerState = "starting", doing: str = "", epoch: str = "a") -> WorkerStatus:
    return WorkerStatus(role=role, group=0, rank=0, pid=7, node="far", state=state, epoch=epoch, doing=doing)


class Start:
    """A start of one prefill and one decode worker under a clock of its own."""

    def __init__(self) -> None:
        self._clock = Clock()
        self._watch = StartWatch([launch("prefill"), launch("decode")], "/logs", self._clock.read)

    def see(self, *workers: WorkerStatus, for_s: float = 0.0) -> None:
        """The router tells of these workers, and for so long of nothing else."""
        self._look(ClusterStatus(workers), for_s)

    def see_nothing(self, for_s: float) -> None:
        """The router answers nothing."""
        self._look(None, for_s)

    def _look(self, status: ClusterStatus | None, for_s: float) -> None:
        self._watch.look(status)
        until_s = self._clock.now_s + for_s
        while self._clock.now_s < until_s:
            self._clock.now_s = min(until_s, self._clock.now_s + LOOK_EVERY_S)
            self._watch.look(status)


def test_a_worker_that_never_reaches_the_router_is_named_with_what_it_tried_to_reach():
    start = Start()
    start.see(worker("prefill"), for_s=JOIN_WITHIN_S)
    with pytest.raises(TandemError, match=rf"^decode-0-rank0 has not reached the router at {CONTROL} for 180 s.*/logs"):
        start.see(worker("prefill"), for_s=1)


def test_a_worker_that_was_lost_and_does_not_come_back_is_named():
    start = Start()
    start.see(worker("prefill"), worker("decode"), for_s=2 * JOIN_WITHIN_S)
    start.see(worker("prefill"), worker("decode", "dead"), for_s=BACK_WITHIN_S)
    with pytest.raises(TandemError, match="^decode-0-rank0 has not reached the router"):
        start.see(worker("prefill"), worker("decode", "dead"), for_s=1)


def test_loading_takes_as_long_as_it_takes_while_it_goes_on():
    start = Start()
    for part in range(20):
        start.see(worker("prefill", "ready"), worker("decode", doing=f"weights {part} of 20"), for_s=SILENT_FOR_S)


def test_loading_that_stands_still_ends_the_start_and_is_named():
    start = Start()
    still = worker("prefill", "ready"), worker("decode", doing="weights 3 of 20")
    start.see(*still, for_s=SILENT_FOR_S)
    with pytest.raises(TandemError, match='decode 0 has said nothing new for 60 minutes.*"weights 3 of 20".*far.* 7'):
        start.see(*still, for_s=1)


def test_a_worker_that_dies_again_and_again_while_starting_ends_the_start():
    start = Start()
    for life in range(MAX_LIVES):
        start.see(worker("prefill"), worker("decode", epoch=str(life)), for_s=50)
    with pytest.raises(TandemError, match="decode 0 died 3 times while starting; see /logs"):
        start.see(worker("prefill"), worker("decode", epoch="last"))


def test_a_router_that_answers_nothing_ends_the_start_and_no_worker_is_blamed_for_it():
    start = Start()
    start.see(worker("prefill"), worker("decode"))
    start.see_nothing(for_s=NO_STATUS_FOR_S)
    start.see(worker("prefill"), worker("decode"))
    start.see_nothing(for_s=NO_STATUS_FOR_S)
    with pytest.raises(TandemError, match="the router runs, but has not answered"):
        start.see_nothing(for_s=1)
