"""How far a reader has to walk: the files of router/front that one completion enters, from the ASGI call to its last
byte.

A file is entered when a function of it, a property and a constructor included, is called by another file. Counted are
the files and the different ways in, from file to file, not how often each is taken: loops and resumed coroutines count
once. What comes from the event loop has no way in, and data that msgspec makes is no call. Every way in beyond a file's
first is a return to it. The token's road is what one token of a stream enters between the control plane and the socket.
"""

import asyncio
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import msgspec
import pytest

from protocol.identity import new_attempt
from protocol.layout import Endpoint, KVLayout, keys_and_values
from protocol.messages import TokenUpdate
from protocol.request import Request
from protocol.stages import Stage
from protocol.topology import RouterSection
from router.control.controller import Controller
from router.control.events import Outcome
from router.control.policies import ReadyGroup
from router.launch import GroupSpec, RouterLaunch
from router.process import build
from tests.integration.router_process import MAX_CONTEXT, VOCAB_SIZE, write_model

FRONT = str(Path(__file__).parents[2] / "router" / "front")
NUM_TOKENS = 3

MAX_FILES = 18
MAX_RETURNS = 7
TOKENS_ROAD = {"call.py", "choice.py", "detokenizer.py", "stop_strings.py", "metrics.py", "app.py"}
"""app.py has the label of the answer, through which all that is sent goes."""


class Control:
    """Stands for the control plane and the workers: says every token at a turn of its own, and then that it is over."""

    def __init__(self, launch: RouterLaunch, walk: "Walk") -> None:
        self._walk = walk
        self.controller = Controller(launch)
        endpoint = Endpoint(1, KVLayout("m", 1, keys_and_values(1, 8, "float32"), 16, 1), "zmq", ("a",))
        self.controller.dispatcher.colocate([ReadyGroup(0, 1, endpoint, 1000)])

    def submit(self, request: Request, deadline_s: float, client: Callable[[object], None]) -> None:
        self._running = asyncio.create_task(self._say(new_attempt(request.request_id, 0, 1, 1), client))

    async def _say(self, attempt: Any, client: Callable[[object], None]) -> None:
        for index in range(NUM_TOKENS):
            await asyncio.sleep(0.001)
            self._walk.tokens.append(set())
            client(TokenUpdate(attempt, index, 300, finish_reason="length" if index == NUM_TOKENS - 1 else None))
        client(Outcome(Stage.FINISHED, "length"))

    def cancel(self, request_id: str, outcome: Outcome) -> None: ...


class Walk:
    """callers: of each file that was entered. tokens: the files that were entered after each token came."""

    def __init__(self) -> None:
        self.callers: defaultdict[str, set[str]] = defaultdict(set)
        self.tokens: list[set[str]] = []

    def look(self, frame: FrameType, event: str, argument: object) -> None:
        """See sys.setprofile."""
        if event != "call" or not (entered := _file(frame)):
            return
        caller = frame.f_back
        while caller is not None and not _file(caller):
            caller = caller.f_back
        came_from = entered if caller is None else _file(caller)
        self.callers[entered] |= {came_from} - {entered}
        if self.tokens:
            self.tokens[-1].add(entered)

    @property
    def num_returns(self) -> int:
        return sum(max(0, len(callers) - 1) for callers in self.callers.values())


def _file(frame: FrameType) -> str:
    path = frame.f_code.co_filename
    return Path(path).name if path.startswith(FRONT) else ""


def walk(folder: Path, path: str, body: dict[str, object]) -> tuple[Walk, bytes]:
    """Return the files entered while an app built as the router's answers body, and the answer."""
    launch = RouterLaunch(
        section=RouterSection(port=0),
        control_host="127.0.0.1",
        model_folder=str(write_model(folder)),
        model_name="tiny",
        max_context=MAX_CONTEXT,
        vocab_size=VOCAB_SIZE,
        groups=(GroupSpec("colocated", 0),),
    )
    seen, answer, asked = Walk(), bytearray(), [msgspec.json.encode(body)]
    control: Any = Control(launch, seen)
    serving, server = build(launch, control)
    app: Any = server.config.app

    async def receive() -> dict[str, object]:
        if asked:
            return {"type": "http.request", "body": asked.pop(), "more_body": False}
        await asyncio.Event().wait()
        return {}

    async def send(message: dict[str, Any]) -> None:
        answer.extend(message.get("body", b""))

    async def scenario() -> None:
        sys.setprofile(seen.look)
        try:
            await asyncio.wait_for(app(_scope(path), receive, send), 20)
        finally:
            sys.setprofile(None)
            serving.close()

    asyncio.run(scenario())
    return seen, bytes(answer)


def _scope(path: str) -> dict[str, object]:
    return {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"host", b"a"), (b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
        "state": {"flow": SimpleNamespace(write_paused=False), "abort_connection": lambda: None},
    }


BODIES = {
    "/v1/completions": {"prompt": "one two"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "one two"}]},
}


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("path", BODIES)
def test_a_completion_walks_a_short_road(tmp_path: Path, path: str, is_streamed: bool) -> None:
    seen, answer = walk(tmp_path, path, {**BODIES[path], "stream": is_streamed, "max_tokens": NUM_TOKENS})
    assert b'"finish_reason":"length"' in answer
    assert len(seen.callers) <= MAX_FILES
    assert seen.num_returns <= MAX_RETURNS
    form = "chat.py" if "chat" in path else "completions.py"
    stream = {form, "event_stream.py"} if is_streamed else set()
    assert seen.tokens[1] == TOKENS_ROAD | stream
