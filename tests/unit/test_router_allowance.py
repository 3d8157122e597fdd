"""How much the router reads of a rank: whatever a sound one says, and not much more."""

import pytest

from protocol.codec import MAX_REPORT_BYTES, decode, encode
from protocol.identity import new_attempt, new_epoch
from protocol.messages import (
    MAX_POSITIONS,
    BlockCounts,
    Fence,
    Heartbeat,
    Join,
    TokenLogprobs,
    Tokens,
    TokenUpdate,
    WorkerInfo,
)
from protocol.topology import RouterSection
from router.control.allowance import BYTES_PER_TICK, MESSAGE_BYTES, MOST_BYTES, Allowances
from router.control.controller import Controller, Transmit
from router.control.membership import identity_of
from router.launch import GroupSpec, RouterLaunch
from worker.control_link import ControlLink

MILLION = 1_000_000 - MESSAGE_BYTES


class Kept:
    """A wire that keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def send(self, data: bytes) -> None:
        self.sent.append(data)

    def receive(self) -> bytes | None:
        return None

    def wait(self, timeout_s: float) -> None:
        del timeout_s


@pytest.fixture
def controller() -> Controller:
    launch = RouterLaunch(
        section=RouterSection(),
        control_host="127.0.0.1",
        model_folder="/",
        model_name="m",
        max_context=16,
        vocab_size=16,
        groups=(GroupSpec("prefill", 0), GroupSpec("decode", 0)),
    )
    return Controller(launch)


def test_a_sender_is_read_until_it_has_said_too_much_and_again_when_it_has_waited() -> None:
    allowances = Allowances()
    most = MOST_BYTES // 1_000_000
    assert all(allowances.spend(b"loud", MILLION) for _ in range(most))
    assert not allowances.spend(b"loud", MILLION)
    assert allowances.spend(b"another", MILLION)
    allowances.tick()
    assert allowances.spend(b"loud", MILLION)


def test_a_sender_may_go_on_for_ever_at_the_pace_of_ticks() -> None:
    allowances = Allowances()
    for _ in range(100):
        assert allowances.spend(b"steady", BYTES_PER_TICK - MESSAGE_BYTES)
        allowances.tick()
    assert not allowances._spent, "who owes nothing is forgotten"


def test_a_rank_that_says_too_much_is_fenced_once_and_others_are_heard(controller: Controller) -> None:
    wild, sound = (WorkerInfo(role, 0, 0, 1, new_epoch(), 1, "a") for role in ("prefill", "decode"))
    for info in (wild, sound):
        controller.receive(identity_of(info), encode(Join(info, "a:1"), info.epoch))
    beat = encode(Heartbeat(BlockCounts(), 0, 0, 0, {}), wild.epoch) + bytes(MAX_REPORT_BYTES)
    effects = [effect for _ in range(600) for effect in controller.receive(identity_of(wild), beat)]
    told = [decode(effect.data).message for effect in effects if isinstance(effect, Transmit)]
    [fence] = [message for message in told if isinstance(message, Fence)]
    assert "more than the router can read" in fence.reason
    assert not controller.membership.is_alive(wild.epoch)
    assert controller.drops["too_much"] > 0
    controller.receive(identity_of(sound), encode(Heartbeat(BlockCounts(9, 9), 0, 0, 0), sound.epoch))
    assert controller.membership.groups["decode", 0].ranks[0].load.blocks.total == 9


def test_a_step_of_very_many_requests_with_all_logprobs_reaches_the_router_whole() -> None:
    attempt = new_attempt("f" * 32, 0, new_epoch(), new_epoch())
    logprobs = TokenLogprobs(-0.5, tuple(range(100_000, 100_020)), tuple(-0.5 - rank for rank in range(20)))
    wire = Kept()
    link = ControlLink(wire, new_epoch())
    updates = [TokenUpdate(attempt, index, 100_000, logprobs, "length") for index in range(2 * MAX_POSITIONS + 1)]
    for update in updates:
        link.emit(update)
    link.flush()
    messages = [decode(data).message for data in wire.sent]
    assert [update for message in messages if isinstance(message, Tokens) for update in message.updates] == updates
    assert max(len(data) for data in wire.sent) < 0.9 * MAX_REPORT_BYTES
