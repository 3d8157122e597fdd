"""When a process that hangs is ended: by the rules, under a clock of our own, and in truth."""

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.rank import Rank, Stationary
from protocol.orders import Batch
from tests.simulation.clock import Clock
from worker.dead_man_switch import LEAST_S, TIMES_LONGEST_GAP, DeadManSwitch

ROOT = Path(__file__).parents[2]


@dataclass
class Timer:
    """What a switch arms: notes when the process would end."""

    clock: Clock = field(default_factory=Clock)
    ends_at_s: float | None = None

    def arm(self, in_s: float | None) -> None:
        self.ends_at_s = None if in_s is None else self.clock.now_s + in_s

    def switch(self) -> DeadManSwitch:
        return DeadManSwitch(self.arm, self.clock.read)

    def left_s(self) -> float:
        assert self.ends_at_s is not None
        return self.ends_at_s - self.clock.now_s


def beat(timer: Timer, switch: DeadManSwitch, every_s: float, for_s: float) -> None:
    until_s = timer.clock.now_s + for_s
    while timer.clock.now_s < until_s:
        timer.clock.now_s += every_s
        assert timer.left_s() > 0, "ended in the midst of its pulses"
        switch.pulse()


def test_pulses_at_whatever_pace_keep_the_process_and_their_end_is_its_end_soon_after():
    timer = Timer()
    switch = timer.switch()
    switch.serve(0.0)
    beat(timer, switch, every_s=2**-11, for_s=1)
    assert LEAST_S - 0.3 <= timer.left_s() <= LEAST_S
    beat(timer, switch, every_s=4, for_s=40)
    assert timer.left_s() == TIMES_LONGEST_GAP * 4
    beat(timer, switch, every_s=2**-7, for_s=10)
    assert timer.left_s() > TIMES_LONGEST_GAP * 4 - 0.3, "a gap that was long once may come again"


def test_a_first_step_may_take_as_long_as_the_trial_lets_expect():
    timer = Timer()
    switch = timer.switch()
    switch.serve(longest_gap_s=7.0)
    assert timer.left_s() == TIMES_LONGEST_GAP * 7


def test_a_start_and_an_end_have_deadlines_that_no_pulse_puts_off():
    timer = Timer()
    switch = timer.switch()
    switch.allow(60)
    timer.clock.now_s += 50
    switch.pulse()
    assert timer.left_s() == 10
    switch.serve(0.0)
    switch.allow(10)
    timer.clock.now_s += 3
    switch.pulse()
    assert timer.left_s() == 7
    switch.disarm()
    assert timer.ends_at_s is None


HANGS = """
import ctypes, sys
from worker.dead_man_switch import DeadManSwitch, end_this_process
switch = DeadManSwitch(end_this_process, least_s=0.3)
switch.allow(60)
switch.serve(0.0)
def a_driver_that_never_returns():
    ctypes.PyDLL(None).sleep(100)  # and keeps the interpreter to itself
if sys.argv[1] == "hangs":
    a_driver_that_never_returns()
switch.disarm()
"""


def test_a_process_that_hangs_in_a_driver_ends_by_itself_and_says_where():
    command, began_s = [sys.executable, "-c", HANGS], time.monotonic()
    done = subprocess.run([*command, "hangs"], cwd=ROOT, timeout=60, capture_output=True, check=False)
    assert done.returncode == 1
    assert b"a_driver_that_never_returns" in done.stderr
    assert time.monotonic() - began_s < 30
    assert subprocess.run([*command, "ends"], cwd=ROOT, timeout=60, check=False).returncode == 0


class SlowEngine:
    """Whose layers take long, though not as long as a whole process may hang."""

    def __init__(self, timer: Timer) -> None:
        self._timer = timer

    def forward(self, batch: Batch, drawn: None, layers_done: Callable[[int], None]) -> None:
        for layer in range(40):
            self._timer.clock.now_s += 4
            assert self._timer.left_s() > 0, "ended in the midst of a step"
            layers_done(layer + 1)


def test_a_step_may_take_minutes_as_long_as_its_layers_go_by():
    timer = Timer()
    switch = timer.switch()
    switch.serve(0.0)
    engine: Any = SlowEngine(timer)
    parked_kv: Any = None
    Rank(engine, parked_kv, Stationary(), switch.pulse).forward(Batch((), (), (), (), ()))
