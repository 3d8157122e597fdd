"""The router's mind, its clients and all groups: a cluster whose sockets, threads and models alone are simulated."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from protocol.messages import TokenUpdate
from protocol.request import Request
from protocol.stages import Stage
from protocol.topology import RouterSection
from router.control.attempts import TOO_LATE
from router.control.controller import Controller, Effect, Transmit
from router.control.dispatch import NoPair, PromptTooLong
from router.control.events import Deliver, End, Outcome
from router.control.plane import TICK_S
from router.launch import GroupSpec, RouterLaunch
from tests.simulation.group import GroupSize, SimulatedGroup
from tests.simulation.oracle import VOCAB_SIZE, oracle_answer
from tests.simulation.world import World

GONE = Outcome(Stage.CANCELLED, "client_gone")
NOBODY = Outcome(Stage.FAILED, "worker_lost", "nobody was there to take the request")
LONG_S = 120.0
_LONGEST_PING = 60


class ForeignToken(AssertionError):
    """A client got a token that the oracle would not have said after its prompt."""


@dataclass
class Client:
    """One request as its client sees it; every token is compared with the oracle's as it comes."""

    request: Request
    answer: list[int]
    token_ids: list[int] = field(default_factory=list)
    outcome: Outcome | None = None

    @property
    def is_complete(self) -> bool:
        return self.outcome is not None and self.outcome.stage is Stage.FINISHED

    def take(self, update: TokenUpdate) -> None:
        name, index = self.request.request_id, len(self.token_ids)
        assert self.outcome is None, f"{name} got a token after its end"
        if index >= len(self.answer) or update.token_id != self.answer[index]:
            raise ForeignToken(f"token {index} of {name} is {update.token_id}; the oracle's answer is {self.answer}")
        self.token_ids.append(update.token_id)

    def end(self, outcome: Outcome) -> None:
        name = self.request.request_id
        assert self.outcome is None, f"{name} ended twice"
        self.outcome = outcome
        assert not self.is_complete or self.token_ids == self.answer, f"{name} ended well without all of its tokens"


class SimulatedCluster:
    """Groups as specs say, in one world. Requests are submitted and cancelled at any time.

    decode_size: of decode groups, where it differs.
    """

    def __init__(
        self,
        world: World,
        specs: Iterable[GroupSpec],
        size: GroupSize,
        policy: str = "least_loaded",
        restart_s: float = 0.5,
        decode_size: GroupSize | None = None,
    ) -> None:
        self.world = world
        self.clients: dict[str, Client] = {}
        self._open: set[str] = set()
        self.on_end: Callable[[Client], None] = lambda client: None
        self._size_of = lambda spec: decode_size if decode_size and spec.role == "decode" else size
        specs = tuple(specs)
        section = RouterSection(policy=policy, canary_s=0)  # type: ignore[arg-type]
        self.controller = Controller(RouterLaunch(
            section=section, control_host="", model_folder="", model_name="", max_context=1 << 20,
            vocab_size=VOCAB_SIZE, groups=specs, is_fetching=size.min_fetch_tokens > 0,
        ))  # fmt: skip
        world.hear = lambda identity, data: self._perform(self.controller.receive(identity, data))
        self.groups = [SimulatedGroup(world, spec, self._size_of(spec), restart_s) for spec in specs]
        world.clock.after(TICK_S, self._tick)

    # --- what a test does ---------------------------------------------------------------------------------------------

    def submit(self, request: Request, timeout_s: float = LONG_S) -> Client:
        """Start a request; the router's own refusal ends it at once."""
        client = self.clients[request.request_id] = Client(request, oracle_answer(request))
        self._open.add(request.request_id)
        self.world.tell(lambda: f"client: {request.request_id}, {len(request.prompt_token_ids)} tokens of prompt")
        try:
            self._perform(self.controller.start(request, self.world.clock.now_s + timeout_s))
        except (NoPair, PromptTooLong):
            self._end(client, NOBODY)
        return client

    def cancel(self, client: Client) -> None:
        """The client leaves."""
        self.world.tell(lambda: f"client: leaves {client.request.request_id}")
        self._perform(self.controller.cancel(client.request.request_id, GONE))

    @property
    def is_ready(self) -> bool:
        """Every group serves, and the router knows it."""
        return self.controller.dispatcher.why_none is None and all(
            group.ready is not None for group in self.controller.membership.groups.values()
        )

    @property
    def has_ended(self) -> bool:
        return not self._open

    @property
    def is_at_rest(self) -> bool:
        """Nothing is held, counted, computed or on its way for any request, anywhere."""
        if len(self.controller.attempts) or not self.is_ready:
            return False
        load = self.controller.dispatcher.load
        is_counting = any(load.prompt_tokens.values()) or any(load.reserved_tokens.values())
        return not is_counting and all(group.is_at_rest and not group.is_cut_off for group in self.groups)

    # --- the router's sockets -----------------------------------------------------------------------------------------

    def _tick(self) -> None:
        self._perform(self.controller.tick(self.world.clock.now_s))
        self.world.clock.after(TICK_S, self._tick)

    def _perform(self, effects: Iterable[Effect]) -> None:
        self.controller.carry_out(effects, self._transmit, self._answer)

    def _answer(self, effect: Deliver | End) -> None:
        match effect:
            case Deliver(update):
                self.world.tell(lambda u=update: f"client: token {u.index} of {u.attempt.request_id}")
                self.clients[update.attempt.request_id].take(update)
            case End(attempt, outcome):
                self.world.tell(lambda a=attempt, o=outcome: f"client: {a.request_id} ends: {o.code} {o.message}")
                self._end(self.clients[attempt.request_id], outcome)

    def _end(self, client: Client, outcome: Outcome) -> None:
        client.end(outcome)
        self._open.discard(client.request.request_id)
        self.on_end(client)

    def _transmit(self, transmit: Transmit) -> str:
        wire = self.world.wires.get(transmit.identity)
        if wire is None or wire.is_unreachable:
            return "its connection is gone"
        if len(transmit.data) > _LONGEST_PING or b"Ping" not in transmit.data:  # a ping says nothing: save the time
            wire.down.send(transmit.data)
        return ""


def is_late(client: Client) -> bool:
    """Whether the request's deadline ended it."""
    return client.outcome == TOO_LATE
