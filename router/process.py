"""The router's life: bind, announce, serve, drain, stop. Started by router/__main__.py."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import msgspec
import uvicorn
from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)

from models.loading import load_facts
from protocol.errors import ConfigError
from protocol.generation_config import SamplingDefaults, load_sampling_defaults
from protocol.memory_size import parse_memory
from protocol.secret import own_secret
from protocol.stages import Stage
from protocol.topology import ClientLimits, RouterSection
from router.control.controller import Controller
from router.control.dispatch import Dispatcher
from router.control.events import Outcome
from router.control.plane import ControlPlane
from router.front.app import build_app
from router.front.body import BodyReader
from router.front.http_protocol import GuardedProtocol
from router.front.metrics import ClusterMetrics, RequestMetrics
from router.front.quota import Quota
from router.front.requests import RequestMaker
from router.front.serving import Serving
from router.front.text import ModelText, load_text
from router.front.work_pool import WorkPool
from router.launch import Addresses, RouterLaunch

BACKLOG = 2048
USER_TIMEOUT_MS = 30_000
"""After this the kernel gives up a client that acknowledges nothing, or whose window stays shut."""
FLUSH_S = 2.0
END_WITHIN_S = 10.0
"""Beyond the grace: who started us may be gone, and then nobody else ends a router that cannot end."""

SHUTTING_DOWN = Outcome(Stage.FAILED, "shutting_down", "the server shut down before this request was finished")

logger = logging.getLogger(__name__)


class QuietServer(uvicorn.Server):
    """uvicorn without its own signal handlers: what a signal means is decided here."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(launch: RouterLaunch, stdin: int) -> None:
    """Run until stdin ends or a signal comes, and all requests have ended. Raise ConfigError when it cannot start."""
    listener = bind(launch.section)
    control = ControlPlane(Controller(launch), launch.control_host, launch.secret or own_secret())
    serving, server = build(launch, control)
    control.start()
    drain_wanted = _watch_ends(stdin, launch.section.grace_s + END_WITHIN_S)
    running = asyncio.create_task(server.serve(sockets=[listener]))
    announce(Addresses(control.address, _url(listener)))
    await asyncio.wait({asyncio.create_task(drain_wanted.wait()), running}, return_when=asyncio.FIRST_COMPLETED)
    await drain(serving, launch.section.grace_s)
    server.should_exit = True
    await running
    serving.close()
    await control.close()


def build(launch: RouterLaunch, control: ControlPlane) -> tuple[Serving, QuietServer]:
    """Return the collaborators of the HTTP half, and the server over them."""
    text = load_text(Path(launch.model_folder), launch.max_context, launch.vocab_size)
    disable_created_metrics()  # type: ignore[no-untyped-call]
    registry = CollectorRegistry()
    serving = Serving(
        control=control,
        metrics=RequestMetrics(registry, launch.model_name),
        bodies=BodyReader(_body_memory(launch.section.limits), launch.max_context),
        text=text,
        requests=_request_maker(launch, text, control.controller.dispatcher),
        model_name=launch.model_name,
        max_context=launch.max_context,
        timeout_s=launch.section.timeout_s,
        created=int(time.time()),
        metrics_writing=WorkPool("metrics", num_threads=1, max_waiting=16),
    )
    registry.register(ClusterMetrics(control.controller, launch.model_name))
    for collector in (ProcessCollector, PlatformCollector, GCCollector):
        collector(registry=registry)
    return serving, _server(build_app(serving, registry, launch.section.cors_origins), launch.section.limits)


def _request_maker(launch: RouterLaunch, text: ModelText, dispatcher: Dispatcher) -> RequestMaker:
    folder, is_models = Path(launch.model_folder), launch.section.sampling_defaults == "model"
    return RequestMaker(
        text=text,
        dispatcher=dispatcher,
        max_context=launch.max_context,
        vocab_size=launch.vocab_size,
        eos_token_ids=load_facts(folder).eos_token_ids,
        sampling_defaults=load_sampling_defaults(folder) if is_models else SamplingDefaults(),
    )


def _body_memory(limits: ClientLimits) -> Quota:
    return Quota(parse_memory(limits.body_memory), parse_memory(limits.body_memory_per_address))


def _server(app: object, limits: ClientLimits) -> QuietServer:
    connections = Quota(limits.connections, limits.connections_per_address)
    config = uvicorn.Config(
        app,  # type: ignore[arg-type]
        http=partial(GuardedProtocol, connections),  # type: ignore[arg-type]
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=int(FLUSH_S),
    )
    return QuietServer(config)


def bind(section: RouterSection) -> socket.socket:
    """Return a listening socket on exactly this host and port; port 0 picks a free one. Raise ConfigError if taken."""
    try:
        family, *_, address = socket.getaddrinfo(section.host, section.port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except OSError as error:
        raise ConfigError(f"router.host {section.host}, router.port {section.port}: {error.strerror}") from None
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)
    return listener


def announce(addresses: Addresses) -> None:
    """Tell the parent process, on stdout, where both sockets are."""
    sys.stdout.write(msgspec.json.encode(addresses).decode() + "\n")
    sys.stdout.flush()


async def drain(serving: Serving, grace_s: float) -> None:
    """Take nothing new, let what runs finish within grace_s, and end the rest with a clear error.

    When no worker is left at all nothing finishes: Ray has ended, or whoever started us was killed.
    """
    attempts, membership = serving.control.controller.attempts, serving.control.controller.membership
    logger.info("draining: %d requests have %g s to finish", len(attempts), grace_s)
    serving.is_draining = True
    membership.drain()
    deadline_s = time.monotonic() + grace_s
    while len(attempts) and membership.has_workers and time.monotonic() < deadline_s:
        await asyncio.sleep(0.05)
    serving.control.cancel_all(SHUTTING_DOWN)


def _watch_ends(stdin: int, within_s: float) -> asyncio.Event:
    """Return an event that a first signal, or the end of stdin, sets; a second signal ends the process at once.

    within_s: from the end of stdin to the end of the process, at the latest.
    """
    wanted = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if wanted.is_set():
            os._exit(1)
        wanted.set()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, on_signal)
    threading.Thread(target=_await_end, args=(stdin, loop, wanted, within_s), daemon=True).start()
    return wanted


def _await_end(stdin: int, loop: asyncio.AbstractEventLoop, wanted: asyncio.Event, within_s: float) -> None:
    with contextlib.suppress(OSError):
        while os.read(stdin, 65536):
            pass
    with contextlib.suppress(RuntimeError):  # the loop may be closed by now
        loop.call_soon_threadsafe(wanted.set)
    time.sleep(within_s)
    os._exit(1)


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
