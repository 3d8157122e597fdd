"""The router's mind without its sockets: who is here, which attempts live, what to send to whom.

plane.py feeds it bytes and carries out its actions; a simulator can do the same. It never blocks and never
reads a clock.
"""

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping

import msgspec

from protocol import codec
from protocol.errors import VersionError, WireError
from protocol.identity import Epoch, new_epoch
from protocol.messages import (
    AnyMessage,
    Committed,
    Departing,
    Envelope,
    Failed,
    Fence,
    Fetch,
    Grant,
    Handoff,
    Heartbeat,
    Join,
    Ping,
    Progress,
    PromptLogprobs,
    Ready,
    Tokens,
    Unfetched,
)
from protocol.request import Request
from protocol.stages import Stage
from router.control.allowance import Allowances
from router.control.attempts import Attempts
from router.control.canary import DEADLINE_S as CANARY_DEADLINE_S
from router.control.canary import Canaries, is_canary
from router.control.dispatch import Dispatcher
from router.control.events import Action, Deliver, Drop, End, Outcome, Send
from router.control.held_prefixes import HeldPrefixes
from router.control.membership import GroupLost, MemberAction, Membership, Reject, identity_of
from router.control.policies import POLICIES
from router.launch import RouterLaunch

MAX_VERSIONS_TOLD = 100
"""Lines in the log about other versions: whoever sends more than these is no worker."""

logger = logging.getLogger(__name__)


class Transmit(msgspec.Struct, frozen=True):
    """Send data to the socket of this identity. receiver is 0 when it is not a member."""

    identity: bytes
    receiver: Epoch
    data: bytes


Effect = Transmit | Deliver | End


class Controller:
    """Membership, dispatcher and attempts, joined. Every method returns what is to be done, in order."""

    def __init__(self, launch: RouterLaunch) -> None:
        self._epoch = new_epoch()
        self.membership = Membership(launch.groups)
        self.dispatcher = Dispatcher(POLICIES[launch.section.policy])
        held = HeldPrefixes() if launch.is_fetching else None
        self.attempts = Attempts(self.dispatcher, launch.vocab_size, held)
        self.drops: Counter[str] = Counter()
        self._is_pairing_due = False
        self._now_s = 0.0
        self._canaries = Canaries(launch.section.canary_s, launch.vocab_size)
        self._allowances = Allowances()
        self._is_colocated = any(spec.role == "colocated" for spec in launch.groups)

    def receive(self, identity: bytes, data: bytes) -> list[Effect]:
        """A worker's socket sent data, which may be anything at all."""
        if not self._allowances.spend(identity, len(data)):
            self.drops["too_much"] += 1
            return self._resolve(self.membership.silence(identity, "it sent more than the router can read"))
        try:
            envelope = codec.decode(data)
        except VersionError as error:
            return self._refuse_version(identity, error)
        except WireError:
            self.drops["malformed"] += 1
            return []
        return self._resolve(self._route(identity, envelope), identity, envelope.sender_epoch)

    def unreachable(self, reasons: Mapping[Epoch, str]) -> list[Effect]:
        """Nothing could be sent to the ranks of these epochs any more, which may be over already."""
        return self._resolve(self.membership.lose_all(reasons))

    def carry_out(
        self, effects: Iterable[Effect], transmit: Callable[[Transmit], str], answer: Callable[[Deliver | End], None]
    ) -> None:
        """Have effects done, and what follows from them. transmit returns why it could not be, "" when it could.

        Whoever could not be reached is lost when all the rest is done: all of them at once.
        """
        waiting = deque(effects)
        unreachable: dict[Epoch, str] = {}
        while waiting or unreachable:
            if not waiting:
                waiting.extend(self.unreachable(unreachable))
                unreachable = {}
                continue
            effect = waiting.popleft()
            if not isinstance(effect, Transmit):
                answer(effect)
            elif reason := transmit(effect):
                unreachable[effect.receiver] = reason

    def start(self, request: Request, deadline_s: float) -> list[Effect]:
        """Begin a request. Raise NoPair, PromptTooLong or Quarantined when nobody takes it."""
        return self._resolve(self.attempts.start(request, deadline_s))

    def cancel(self, request_id: str, outcome: Outcome) -> list[Effect]:
        """End a request for a reason of the router's own."""
        return self._resolve(self.attempts.cancel(request_id, outcome))

    def cancel_all(self, outcome: Outcome) -> list[Effect]:
        return self._resolve(self.attempts.cancel_all(outcome))

    def stop(self) -> list[Effect]:
        """Tell every rank that nothing more will come."""
        return self._resolve(self.membership.stop())

    def tick(self, now_s: float) -> list[Effect]:
        """Called a few times a second: see that no deadline has passed, and that whoever is silent is still there."""
        self._allowances.tick()
        self._now_s = now_s
        pings = [Send(epoch, Ping()) for epoch in self.membership.silent()]
        return self._resolve([*self.attempts.expire(now_s), *pings, *self._try_out(now_s)])

    @property
    def why_not_ready(self) -> str | None:
        """None when answers have got through every group lately, otherwise why not."""
        pairs = self.dispatcher.cover()
        why_unproved = self._canaries.why_unproved(pairs, self.attempts.proved_s, self._now_s)
        return self.dispatcher.why_none or why_unproved

    # --- inside -------------------------------------------------------------------------------------------------------

    def _refuse_version(self, identity: bytes, error: VersionError) -> list[Effect]:
        """Answer in our version, which the sender can tell from its own, although it may understand nothing else."""
        self.drops["other_version"] += 1
        text = f"it speaks version {error.theirs} of the control protocol, this router version {error.ours}"
        if self.drops["other_version"] <= MAX_VERSIONS_TOLD:
            logger.warning("%r: %s", identity.decode("latin-1"), text)
        return self._resolve([Reject(text)], identity)

    def _route(self, identity: bytes, envelope: Envelope) -> Iterable[Action | MemberAction]:
        sender, message = envelope.sender_epoch, envelope.message
        if isinstance(message, Join):
            is_own = identity == identity_of(message.worker) and sender == message.worker.epoch
            return self.membership.join(message) if is_own else [Drop("wrong_identity")]
        if not self.membership.is_alive(sender):
            return [Drop("dead_epoch"), Reject("this life is over, or was never known here")]
        if identity != self.membership.identity(sender):
            return [Drop("wrong_identity")]
        self.membership.hear(sender)
        if isinstance(message, Progress):
            return self.membership.progress(sender, message)
        if isinstance(message, Departing):
            return self._depart(sender)
        if not self.membership.leads(sender):
            return [Drop("not_a_leader")]
        return self._from_leader(sender, message)

    def _depart(self, sender: Epoch) -> Iterable[Action | MemberAction]:
        """A rank ends because somebody wants it to: what its group holds goes on elsewhere, and nothing is to blame."""
        leader = self.membership.leader_of(sender)
        moved = self.attempts.leave(leader) if leader else []
        return [*moved, *self.membership.lose(sender, "it was asked to end", is_reachable=True)]

    def _from_leader(self, sender: Epoch, message: AnyMessage) -> Iterable[Action | MemberAction]:
        match message:
            case Tokens():
                return [action for update in message.updates for action in self.attempts.receive(sender, update)]
            case Grant() | Fetch() | Unfetched() | Handoff() | Committed() | PromptLogprobs() | Failed():
                return self.attempts.receive(sender, message)
            case Heartbeat():
                return self.membership.heartbeat(sender, message)
            case Ready():
                self._is_pairing_due = True
                return self.membership.ready(sender, message)
            case _:
                return [Drop("not_for_a_router")]

    def _resolve(
        self, actions: Iterable[Action | MemberAction], identity: bytes = b"", sender: Epoch = 0
    ) -> list[Effect]:
        """Carry out what concerns the router's own state, and address the rest.

        A rejection names the life that it is meant for, like everything else: the next one is not to hear it.
        """
        effects: list[Effect] = []
        waiting = deque(actions)
        while waiting or (waiting := deque(self._follow_up())):
            match waiting.popleft():
                case GroupLost(epoch):
                    waiting.extend(self.attempts.lose(epoch))
                    self._is_pairing_due = True
                case Drop(reason):
                    self.drops[reason] += 1
                case Send(receiver, message):
                    effects += self._address(receiver, message)
                case Reject(reason):
                    effects.append(Transmit(identity, 0, codec.encode(Fence(reason), self._epoch, sender)))
                case Deliver() | End() as effect:
                    effects += _for_client(effect)
        return effects

    def _try_out(self, now_s: float) -> list[Action]:
        due = self._canaries.due(self.dispatcher.cover(), self.attempts.proved_s, now_s)
        deadline_s = now_s + CANARY_DEADLINE_S
        return [action for pair in due for action in self.attempts.try_out(pair, self._canaries.request(), deadline_s)]

    def _follow_up(self) -> list[Action]:
        """When all else is done: pair up who is left, and let requests that have lost their pair go on."""
        if self._is_pairing_due:
            self._is_pairing_due = False
            self._pair_up()
        return self.attempts.resume()

    def _address(self, receiver: Epoch, message: AnyMessage) -> list[Effect]:
        identity = self.membership.address(receiver)
        if identity is None:
            return []  # it is gone, and everybody who waits for it has been told
        return [Transmit(identity, receiver, codec.encode(message, self._epoch, receiver))]

    def _pair_up(self) -> None:
        if self._is_colocated:
            self.dispatcher.colocate(self.membership.ready_groups("colocated"))
        else:
            self.dispatcher.pair_up(self.membership.ready_groups("prefill"), self.membership.ready_groups("decode"))


def _for_client(effect: Deliver | End) -> list[Effect]:
    """Return what a client is to hear; a canary has none, but a person should know of one that did not get through."""
    attempt = effect.update.attempt if isinstance(effect, Deliver) else effect.attempt
    if not is_canary(attempt.request_id):
        return [effect]
    if isinstance(effect, End) and effect.outcome.stage is Stage.FAILED:
        logger.warning("a canary did not get through: %s: %s", effect.outcome.code, effect.outcome.message)
    return []
