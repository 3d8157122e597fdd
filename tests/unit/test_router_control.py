"""The control socket's loop: it never keeps the rest of the router waiting for long."""

import asyncio

import pytest

from protocol.topology import RouterSection
from router.control import plane as control
from router.control.controller import Controller, Effect, Transmit
from router.control.plane import ControlPlane
from router.launch import GroupSpec, RouterLaunch
from tests.members import SECRET

NUM_PINGS = 10_000


def controller_of_many() -> Controller:
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


def test_streams_get_their_turns_between_the_pings_of_many_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "TICK_S", 0.0)
    pinged: list[int] = []
    turns: list[int] = []

    def tick(now_s: float) -> list[Effect]:
        return [] if pinged else [Transmit(b"nobody", number + 1, b"") for number in range(NUM_PINGS)]

    async def scenario() -> None:
        plane = ControlPlane(controller_of_many(), "127.0.0.1", SECRET)
        monkeypatch.setattr(plane.controller, "tick", tick)
        monkeypatch.setattr(plane.controller, "unreachable", lambda reasons: pinged.extend(reasons) or [])
        plane.start()
        while len(pinged) < NUM_PINGS:
            await asyncio.sleep(0)
            turns.append(len(pinged))
        await plane.close()

    asyncio.run(asyncio.wait_for(scenario(), 20))
    assert max(later - earlier for earlier, later in zip([0, *turns], turns, strict=False)) <= 1000
    assert pinged == list(range(1, NUM_PINGS + 1))
