"""The channel of a group when somebody is missing at its other end, or a stranger is there."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch
import zmq

from engine import group
from engine.group import Follower, Leader, Place
from models.tensor_parallel import TensorParallel
from protocol.codec import decode, encode
from protocol.errors import GroupError
from protocol.messages import Fence, Join, Welcome
from protocol.orders import Counted, Enlist
from protocol.orders import encode as encode_report
from protocol.sockets import bind
from protocol.topology import KVTransferSection, PrefillSection
from tests.members import SECRET, member
from tests.ranks import run_ranks
from worker import life as worker
from worker.control_link import Fenced
from worker.launch import CacheLaunch, ModelLaunch, WorkerLaunch
from worker.life import run_worker

HOST = "127.0.0.1"
LEADER, FOLLOWER = Place(0, 2, HOST, "cpu"), Place(1, 2, HOST, "cpu")


class OwnRouter:
    """Greets one leader, and says what a test wants it to hear."""

    def __init__(self) -> None:
        self._context = zmq.Context()
        self._socket = member(self._context, zmq.ROUTER)
        self.address = bind(self._socket, HOST)

    def welcome(self) -> str:
        """Wait for the leader to join; return where its followers find it."""
        assert self._socket.poll(10_000)
        self._identity, data = self._socket.recv_multipart()
        join = decode(data).message
        assert isinstance(join, Join)
        assert join.rendezvous
        self._epoch = join.worker.epoch
        self.say(Welcome(join.rendezvous, self._epoch))
        return join.rendezvous

    def say(self, message: Welcome | Fence) -> None:
        self._socket.send_multipart([self._identity, encode(message, 1, self._epoch)])

    def close(self) -> None:
        self._socket.close()
        self._context.term()


@pytest.fixture
def router() -> Iterator[OwnRouter]:
    router = OwnRouter()
    yield router
    router.close()


def alongside(work: Callable[[], None]) -> "Future[None]":
    """Return what becomes of work on a thread of its own, which a test that fails leaves behind."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def leaders_launch(control: str) -> WorkerLaunch:
    return WorkerLaunch(
        role="prefill",
        group=0,
        rank=0,
        model=ModelLaunch("", "float32", 64),
        role_section=PrefillSection(tensor_parallel=2),
        kv_cache=CacheLaunch(1 << 20, 0.0, 16, prefix_caching=True),
        kv_transfer=KVTransferSection(),
        device="cpu",
        control=control,
        secret=SECRET,
        host=HOST,
    )


def test_a_leader_whose_follower_was_lost_while_loading_hears_that_its_life_is_over(
    router: OwnRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_loaded = threading.Event()
    mover = SimpleNamespace(address="", close=lambda: None)
    kept: list[object] = []  # a real rank keeps its collectives too; without, the follower may find them closed

    def load(*arguments: object) -> SimpleNamespace:
        kept.extend(arguments)
        is_loaded.set()
        return SimpleNamespace(rank=SimpleNamespace(mover=mover))

    monkeypatch.setattr(worker, "load_rank", load)
    life = alongside(lambda: run_worker(leaders_launch(router.address)))
    with closing(Follower(FOLLOWER, router.welcome(), SECRET)) as lost:
        lost.connect()
        assert is_loaded.wait(10)
        router.say(Fence("rank 1 of prefill group 0 is lost"))
        with pytest.raises(Fenced, match="rank 1 of prefill group 0 is lost"):
            life.result(5)


def test_ranks_that_never_enlist_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "LOADING_TIMEOUT_S", 0.1)
    with closing(Leader(Place(0, 3, HOST, "cpu"), SECRET)) as leader:
        leader._addresses[2] = "as if rank 2 had enlisted"
        with pytest.raises(GroupError, match=r"ranks \[1\] of this group did not load their weights within 0.1 s"):
            leader.await_followers(lambda: None)


COLLECTIVES: dict[str, Callable[[TensorParallel], object]] = {
    "all_reduce": lambda group: group.all_reduce(torch.ones(3)),
    "broadcast": lambda group: group.broadcast(torch.ones(3)),
    "least": lambda group: group.least(1, torch.device("cpu")),
    "gather_to_leader": lambda group: group.gather_to_leader(torch.ones(3)),
}


@pytest.mark.parametrize("name", COLLECTIVES)
def test_a_rank_that_dies_in_the_middle_of_a_step_ends_the_others_in_a_sentence_and_not_as_a_fault(name: str) -> None:
    survivor = 1 if name == "broadcast" else 0  # who waits for somebody

    def step(group: TensorParallel) -> None:
        if group.rank == survivor:
            with pytest.raises(GroupError, match="ranks cannot go on together; one of them may be lost"):
                COLLECTIVES[name](group)

    run_ranks(2, step)


def test_a_follower_whose_leader_takes_no_reports_ends_instead_of_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "_MAX_ORDERS", 1)
    with closing(Leader(LEADER, SECRET)) as leader, closing(Follower(FOLLOWER, leader.rendezvous, SECRET)) as follower:
        leader._socket.close()

        def report_on() -> None:
            for _ in range(1000):
                follower.report(Counted(1, {}))

        with pytest.raises(GroupError, match="the leader takes no more reports"):
            alongside(report_on).result(20)


def test_whoever_is_no_rank_of_the_group_is_not_taken_for_one() -> None:
    with (
        closing(Leader(LEADER, SECRET)) as leader,
        closing(Follower(FOLLOWER, leader.rendezvous, SECRET)) as follower,
        zmq.Context() as context,
        member(context, zmq.DEALER, "orders") as stranger,
    ):
        stranger.setsockopt(zmq.IDENTITY, b"rank-2")  # of two
        stranger.connect(str(leader.pollable.getsockopt_string(zmq.LAST_ENDPOINT)))
        strays = [Enlist(1, 5, "his own"), Enlist(2, 5, "his own"), Counted(1, {"frames": 1}), Counted(-1, {})]
        for stray in strays:
            stranger.send(encode_report(stray))
        while leader.counters["stray_reports"] < len(strays):
            assert leader.pollable.poll(10_000)
            assert leader.reports() == []
        follower.report(Enlist(1, 5, "the follower's"))
        assert leader.await_followers(lambda: None) == ["the follower's"]


def test_a_stranger_is_not_heard_by_a_leader_however_much_he_says() -> None:
    with (
        closing(Leader(LEADER, SECRET)) as leader,
        closing(Follower(FOLLOWER, leader.rendezvous, SECRET)) as follower,
        zmq.Context() as context,
        context.socket(zmq.DEALER) as stranger,
    ):
        stranger.setsockopt(zmq.LINGER, 0)
        stranger.connect(str(leader.pollable.getsockopt_string(zmq.LAST_ENDPOINT)))
        for _ in range(1000):
            stranger.send(encode_report(Enlist(1, 5, "his own")))
        follower.report(Enlist(1, 5, "the follower's"))
        assert leader.await_followers(lambda: None) == ["the follower's"]
        assert not leader.pollable.poll(500)
        assert set(leader.counters.values()) == {0}
