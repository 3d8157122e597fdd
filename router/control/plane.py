"""The control socket's loop: bytes in to the controller, its effects out to workers and waiting clients.

One ZMQ ROUTER socket for all ranks. A plain socket with its file descriptor on the event loop, not zmq.asyncio: sending
must not wait, because the order of what is sent is the controller's order. Started by router/process.py.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence

import zmq

from protocol import sockets
from protocol.errors import ConfigError
from protocol.messages import PromptLogprobs, TokenUpdate
from protocol.request import Request
from protocol.secret import Secret
from router.control.controller import Controller, Effect, Transmit
from router.control.events import Deliver, End, Outcome

TICK_S = 0.15
"""Two ticks are longer than a healthy rank's pause between two heartbeats, so that only silent ranks are pinged."""
MAX_QUEUED = 20_000
"""Messages that one rank may leave unread before its connection counts as gone."""
MAX_RECEIVED_AT_ONCE = 256
MAX_PERFORMED_AT_ONCE = 256

Client = Callable[[TokenUpdate | PromptLogprobs | Outcome], None]

logger = logging.getLogger(__name__)


class ControlPlane:
    """Owns the socket and the clients' callbacks; decides nothing."""

    def __init__(self, controller: Controller, host: str, secret: Secret) -> None:
        """Bind to a free port of host; address says which. Raise ConfigError when host is not ours."""
        self.controller = controller
        self._context = zmq.Context(io_threads=1)
        socket = self._context.socket(zmq.ROUTER)
        self._socket = sockets.prepare_for_members(socket, secret.key("control"), MAX_QUEUED)
        try:
            self.address = sockets.bind(self._socket, host)
        except zmq.ZMQError as error:
            self._socket.close()
            raise ConfigError(f"the workers' socket cannot be bound to {host}: {error}") from None
        self._clients: dict[str, Client] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ticker: asyncio.Task[None] | None = None
        self._is_coming_back = False

    def start(self) -> None:
        """Begin to listen, on the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket.fileno(), self._receive)
        self._ticker = self._loop.create_task(self._tick())

    async def close(self) -> None:
        """Tell all ranks to stop, leave them a moment to take it in, and close the socket."""
        self._perform(self.controller.stop())
        if self._loop is not None and self._ticker is not None:
            self._loop.remove_reader(self._socket.fileno())
            self._ticker.cancel()
        await asyncio.sleep(0)
        self._socket.close(linger=500)
        await asyncio.to_thread(self._context.term)

    def submit(self, request: Request, deadline_s: float, client: Client) -> None:
        """Start request; client is called for every token and once for the outcome. Raise NoPair or PromptTooLong."""
        effects = self.controller.start(request, deadline_s)
        self._clients[request.request_id] = client
        self._perform(effects)

    def cancel(self, request_id: str, outcome: Outcome) -> None:
        """End a request; its client hears outcome, unless it has heard another already."""
        self._perform(self.controller.cancel(request_id, outcome))

    def cancel_all(self, outcome: Outcome) -> None:
        self._perform(self.controller.cancel_all(outcome))

    # --- inside -------------------------------------------------------------------------------------------------------

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            try:
                await self._perform_in_parts(self.controller.tick(time.monotonic()))
            except Exception:
                self._count_bug()

    def _receive(self) -> None:
        """Take what has come. ZMQ signals its descriptor by edges: if something is left, this must be called again."""
        for _ in range(MAX_RECEIVED_AT_ONCE):
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.ZMQError:
                return
            self._take(parts)
        self._come_back()

    def _take(self, parts: list[bytes]) -> None:
        if len(parts) != 2:
            self.controller.drops["malformed"] += 1
            return
        try:
            self._perform(self.controller.receive(parts[0], parts[1]))
        except Exception:
            self._count_bug()

    def _come_back(self) -> None:
        if self._loop is not None and not self._is_coming_back:
            self._is_coming_back = True
            self._loop.call_soon(self._back)

    def _back(self) -> None:
        self._is_coming_back = False
        if not self._socket.closed:
            self._receive()

    async def _perform_in_parts(self, effects: Sequence[Effect]) -> None:
        """Thousands of messages at once would keep every stream waiting for as long as they take."""
        for start in range(0, len(effects), MAX_PERFORMED_AT_ONCE):
            self._perform(effects[start : start + MAX_PERFORMED_AT_ONCE])
            await asyncio.sleep(0)

    def _perform(self, effects: Iterable[Effect]) -> None:
        self.controller.carry_out(effects, self._transmit, self._answer)

    def _answer(self, effect: Deliver | End) -> None:
        match effect:
            case Deliver(update):
                self._clients[update.attempt.request_id](update)
            case End(attempt, outcome):
                self._clients.pop(attempt.request_id)(outcome)

    def _transmit(self, transmit: Transmit) -> str:
        """Return why that could not be; "" when it could."""
        try:
            self._socket.send_multipart((transmit.identity, transmit.data), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            return self._undeliverable(transmit, error)
        finally:
            self._come_back()  # sending may have swallowed the edge that announces something to receive
        return ""

    def _undeliverable(self, transmit: Transmit, error: zmq.ZMQError) -> str:
        is_full = error.errno == zmq.EAGAIN
        reason = f"it left {MAX_QUEUED} messages unread" if is_full else "its connection is gone"
        if self.controller.membership.is_alive(transmit.receiver):
            logger.warning("%s: %s", transmit.identity.decode("latin-1"), reason)
        return reason

    def _count_bug(self) -> None:
        self.controller.drops["router_bug"] += 1
        logger.exception("the router failed to act on a control message; it goes on with the next")
