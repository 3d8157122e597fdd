"""Groups as failure units: welcome, readiness, loss, and lives that must not come back."""

import msgspec
import pytest

from protocol.codec import decode, encode
from protocol.identity import new_attempt
from protocol.layout import Endpoint, KVLayout, keys_and_values
from protocol.messages import (
    PROTOCOL_VERSION,
    BlockCounts,
    Fence,
    Heartbeat,
    Join,
    PeerLost,
    Ping,
    Ready,
    Tokens,
    TokenUpdate,
    Welcome,
    WorkerInfo,
)
from protocol.topology import RouterSection
from router.control.controller import MAX_VERSIONS_TOLD, Controller, Transmit
from router.control.events import Send
from router.control.membership import GroupLost, Membership, Reject, identity_of
from router.launch import GroupSpec, RouterLaunch

SPECS = (GroupSpec("prefill", 0, 2), GroupSpec("decode", 0, 1), GroupSpec("decode", 1, 1))


def info(role="prefill", group=0, rank=0, size=2, epoch=1) -> WorkerInfo:
    return WorkerInfo(role, group, rank, size, epoch, 1, "n")


def ready(epoch: int, size: int) -> Ready:
    layout = KVLayout("m", 1, keys_and_values(2, 8, "float32"), 16, size)
    return Ready(Endpoint(epoch, layout, "zmq", ("tcp://a:1",) * size), 100)


@pytest.fixture
def members() -> Membership:
    """Prefill group 0 (leader 1, follower 2) and decode groups 0 (3) and 1 (4), all ready."""
    membership = Membership(SPECS)
    membership.join(Join(info(rank=0, epoch=1), "tcp://r"))
    membership.join(Join(info(rank=1, epoch=2)))
    membership.ready(1, ready(1, 2))
    for group, epoch in ((0, 3), (1, 4)):
        membership.join(Join(info("decode", group, 0, 1, epoch), "tcp://r"))
        membership.ready(epoch, ready(epoch, 1))
    return membership


def test_a_follower_is_welcomed_once_its_leader_is_there() -> None:
    membership = Membership(SPECS)
    assert membership.join(Join(info(rank=1, epoch=2))) == []
    welcome = Welcome("tcp://r", 1)
    assert membership.join(Join(info(rank=0, epoch=1), "tcp://r")) == [Send(1, welcome), Send(2, welcome)]


def test_a_group_takes_requests_only_when_its_leader_says_so_with_all_ranks_there(members: Membership) -> None:
    assert [group.epoch for group in members.ready_groups("prefill")] == [1]
    alone = Membership(SPECS)
    alone.join(Join(info(rank=0, epoch=1), "tcp://r"))
    fences = [a.message for a in alone.ready(1, ready(1, 2)) if isinstance(a, Send)]
    assert alone.ready_groups("prefill") == []
    assert len(fences) == 1
    assert isinstance(fences[0], Fence)
    assert "1 of 2 ranks" in fences[0].reason


def test_losing_one_rank_ends_its_whole_group_and_tells_every_other_leader(members: Membership) -> None:
    actions = members.lose(2, "its connection is gone")
    fenced = [a.receiver for a in actions if isinstance(a, Send) and isinstance(a.message, Fence)]
    assert fenced == [1]
    assert [a for a in actions if isinstance(a, Send) and isinstance(a.message, PeerLost)] == [
        Send(3, PeerLost(1)),
        Send(4, PeerLost(1)),
    ]
    assert actions[-1] == GroupLost(1)
    assert members.ready_groups("prefill") == []
    assert [rank.state for rank in members.groups["prefill", 0].ranks.values()] == ["dead", "dead"]
    assert members.lose(1, "again") == []


def test_groups_that_are_lost_at_once_are_told_of_to_those_who_are_left(members: Membership) -> None:
    """A thousand groups behind one cable would otherwise be told of one another, half a million messages."""
    actions = members.lose_all({2: "its connection is gone", 1: "its connection is gone", 3: "its connection is gone"})
    assert [a for a in actions if isinstance(a, Send) and isinstance(a.message, PeerLost)] == [
        Send(4, PeerLost(1)),
        Send(4, PeerLost(3)),
    ]
    assert [a for a in actions if isinstance(a, GroupLost)] == [GroupLost(1), GroupLost(3)]


def test_a_lost_group_comes_back_under_new_epochs_and_its_old_follower_is_not_welcomed(members: Membership) -> None:
    members.lose(1, "its connection is gone")
    assert members.join(Join(info(rank=0, epoch=10), "tcp://new")) == [Send(10, Welcome("tcp://new", 10))]
    assert members.join(Join(info(rank=1, epoch=11))) == [Send(11, Welcome("tcp://new", 10))]
    members.ready(10, ready(10, 2))
    assert [group.epoch for group in members.ready_groups("prefill")] == [10]
    assert Reject("this life is over") in members.join(Join(info(rank=1, epoch=2)))


def test_only_whoever_has_been_silent_is_asked_after_and_then_again_and_again(controller: Controller) -> None:
    """Eight thousand ranks that all speak four times a second need not be spoken to five times a second as well."""

    def pinged() -> list[int]:
        return sorted(effect.receiver for effect in controller.tick(0.0) if isinstance(effect, Transmit))

    def speak(epoch: int) -> None:
        controller.receive(b"colocated-0-0-5", encode(Heartbeat(BlockCounts(), 0, 0, 0), epoch))

    pinged(), pinged()
    assert pinged() == pinged() == [5]
    speak(5)
    assert [pinged(), pinged(), pinged(), pinged()] == [[], [], [5], [5]]
    speak(5)
    pinged()
    speak(5)
    assert [pinged(), pinged()] == [[], []]


def test_what_a_stranger_says_in_a_ranks_name_is_no_sign_of_life(controller: Controller) -> None:
    for _ in range(3):
        controller.receive(b"somebody", encode(Heartbeat(BlockCounts(), 0, 0, 0), 5))
        effects = controller.tick(0.0)
    assert [effect.receiver for effect in effects if isinstance(effect, Transmit)] == [5]


def test_a_new_life_of_a_rank_ends_the_old_one_even_if_its_connection_still_stood(members: Membership) -> None:
    actions = members.join(Join(info(rank=1, epoch=20)))
    assert GroupLost(1) in actions
    assert not members.is_alive(1)
    assert not members.is_alive(2)
    assert members.is_alive(20)


@pytest.mark.parametrize(
    ("worker", "rendezvous", "complaint"),
    [
        (info("decode", 7, 0, 1, 9), "tcp://r", "no decode group 7 is expected"),
        (info("colocated", 0, 0, 1, 9), "tcp://r", "no colocated group 0 is expected"),
        (info("prefill", 0, 2, 2, 9), None, "rank 2 of 2 does not fit a group of 2 ranks"),
        (info("decode", 0, 0, 2, 9), "tcp://r", "rank 0 of 2 does not fit a group of 1 ranks"),
        (info("prefill", 0, 1, 2, 9), "tcp://r", "must say where its followers find it"),
        (info("prefill", 0, 0, 2, 9), None, "must say where its followers find it"),
    ],
)
def test_a_rank_that_nobody_expects_is_told_so_and_changes_nothing(members, worker, rendezvous, complaint) -> None:
    actions = members.join(Join(worker, rendezvous))
    assert any(isinstance(action, Reject) and complaint in action.reason for action in actions)
    assert not members.is_alive(9)
    assert members.is_alive(1)


@pytest.fixture
def controller() -> Controller:
    launch = RouterLaunch(
        section=RouterSection(),
        control_host="127.0.0.1",
        model_folder="/",
        model_name="m",
        max_context=100,
        vocab_size=100,
        groups=(GroupSpec("colocated", 0),),
    )
    controller = Controller(launch)
    worker = info("colocated", 0, 0, 1, 5)
    controller.receive(identity_of(worker), encode(Join(worker, "tcp://r"), 5))
    controller.receive(identity_of(worker), encode(ready(5, 1), 5))
    assert controller.dispatcher.why_none is None
    return controller


def test_messages_with_another_epoch_than_their_socket_are_dropped_and_counted(controller: Controller) -> None:
    beat = Heartbeat(BlockCounts(9, 9), 0, 0, 0)
    assert controller.receive(b"colocated-0-0-6", encode(beat, 5)) == []
    assert controller.receive(b"colocated-0-0-5", encode(Join(info("colocated", 0, 0, 1, 6), "x"), 6)) == []
    assert controller.drops == {"wrong_identity": 2}
    assert controller.membership.groups["colocated", 0].ranks[0].load.blocks.total == 0


def test_a_life_that_is_over_is_fenced_when_it_speaks_again(controller: Controller) -> None:
    controller.unreachable({5: "gone"})
    effects = controller.receive(b"colocated-0-0-5", encode(Tokens((TokenUpdate(new_attempt("r", 0, 5, 5), 0, 1),)), 5))
    assert [effect.identity for effect in effects if isinstance(effect, Transmit)] == [b"colocated-0-0-5"]
    assert decode(effects[0].data).receiver_epoch == 5, "the rank's next life must not take it for itself"
    assert controller.drops == {"dead_epoch": 1}


@pytest.mark.parametrize("message", [Ping(), Welcome("a", 1), Fence("x")])
def test_messages_that_only_a_router_sends_are_dropped_and_counted(controller: Controller, message) -> None:
    assert controller.receive(b"colocated-0-0-5", encode(message, 5)) == []
    assert controller.drops == {"not_for_a_router": 1}


@pytest.mark.parametrize("rest", [[], ["another", {"order": 1}]])
def test_a_worker_of_another_version_hears_which_versions_differ_and_so_does_the_log(
    controller: Controller, caplog: pytest.LogCaptureFixture, rest: list[object]
) -> None:
    effects = controller.receive(b"colocated-0-0-6", msgspec.msgpack.encode([PROTOCOL_VERSION + 1, *rest]))
    [answer] = [effect for effect in effects if isinstance(effect, Transmit)]
    assert answer.identity == b"colocated-0-0-6"
    versions = f"version {PROTOCOL_VERSION + 1} of the control protocol, this router version {PROTOCOL_VERSION}"
    assert versions in decode(answer.data).message.reason
    assert versions in caplog.text
    assert "colocated-0-0-6" in caplog.text
    assert controller.drops == {"other_version": 1}


def test_whoever_goes_on_in_another_version_does_not_fill_the_log(
    controller: Controller, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3 * MAX_VERSIONS_TOLD):
        controller.receive(b"x", msgspec.msgpack.encode([PROTOCOL_VERSION + 1]))
    assert len(caplog.records) == MAX_VERSIONS_TOLD
    assert controller.drops == {"other_version": 3 * MAX_VERSIONS_TOLD}


def test_no_bytes_at_all_can_upset_the_controller(controller: Controller) -> None:
    good = encode(Heartbeat(BlockCounts(), 0, 0, 0), 5)
    for cut in range(len(good)):
        controller.receive(b"colocated-0-0-5", good[:cut])
        controller.receive(b"\x00\xff", bytes([cut % 256]) * cut)
    assert controller.drops["malformed"] == 2 * len(good)
