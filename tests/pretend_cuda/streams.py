"""Streams and events of the pretended device, and in which order their work is done. Knows nothing of tensors.

Work that is queued on a stream is done when somebody waits, or now and then by itself: a seed decides how eager the
device is, and which of the streams that could go on does.
"""

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.utils._python_dispatch import _disable_current_modes

_MOST_PER_QUERY = 8
_PATIENCE_S = 20.0
_POLL_S = 1e-4


class Waited(RuntimeError):
    """The host waited for the device where it must not."""


class Until(Protocol):
    """What work may wait for."""

    @property
    def is_reached(self) -> bool: ...


class Mark:
    """A place in a stream's order."""

    def __init__(self) -> None:
        self.is_reached = False

    def reach(self) -> None:
        self.is_reached = True


@dataclass(frozen=True)
class Work:
    """after: what it waits for besides the work before it. is_upkeep: nobody has asked for it."""

    run: Callable[[], None]
    after: Until | None = None
    is_upkeep: bool = False


class Capture(Protocol):
    """A graph that is being made."""

    stream: "Stream"

    def record(self, work: Work) -> None: ...


class Timeline:
    """All streams of a device, and what each of the host's threads does with them."""

    def __init__(self, seed: int) -> None:
        self.lock = threading.RLock()
        self.rng = random.Random(seed)
        self._eagerness = self.rng.choice([0.0, 0.0, 0.2, 1.0])
        self._streams: list[Stream] = []
        self._fault: BaseException | None = None
        self._of_thread = threading.local()

    def new_stream(self, device: object = None, priority: int = 0) -> "Stream":
        """As torch.cuda.Stream."""
        stream = Stream(self)
        with self.lock:
            self._streams.append(stream)
        return stream

    def new_event(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> "Event":
        """As torch.cuda.Event."""
        return Event(self)

    @property
    def default(self) -> "Stream":
        """The default stream of the process that this thread plays a part of."""
        if not hasattr(self._of_thread, "default"):
            self._of_thread.default = self.new_stream()
        stream: Stream = self._of_thread.default
        return stream

    def join(self, default: "Stream") -> None:
        """Let this thread be of the process with that default stream."""
        self._of_thread.default = default

    def current_stream(self, device: object = None) -> "Stream":
        """As torch.cuda.current_stream."""
        stream: Stream | None = getattr(self._of_thread, "stream", None)
        return stream or self.default

    @contextmanager
    def on_stream(self, stream: "Stream") -> Iterator[None]:
        """As torch.cuda.stream."""
        before = getattr(self._of_thread, "stream", None)
        self._of_thread.stream = stream
        try:
            yield
        finally:
            self._of_thread.stream = before

    @property
    def capture(self) -> Capture | None:
        """The graph that this thread is making."""
        return getattr(self._of_thread, "capture", None)

    @contextmanager
    def capturing(self, capture: Capture) -> Iterator[None]:
        assert self.capture is None, "one graph at a time"
        self._of_thread.capture = capture
        try:
            yield
        finally:
            self._of_thread.capture = None

    @contextmanager
    def no_waiting(self) -> Iterator[None]:
        """Let this thread not wait for the device; asking whether an event is over is no waiting."""
        before = getattr(self._of_thread, "is_hurried", False)
        self._of_thread.is_hurried = True
        try:
            yield
        finally:
            self._of_thread.is_hurried = before

    def queue(self, work: Work, stream: "Stream") -> None:
        """Put work at a stream's end, or into the graph that is being made of it."""
        self.check()
        capture = self.capture
        if capture is not None:
            if capture.stream is not stream:
                raise RuntimeError("work for another stream while a graph is captured")
            capture.record(work)
            return
        self.put(work, stream)
        if self.rng.random() < self._eagerness:
            self._go_on(self.rng.randint(1, 3))

    def put(self, work: Work, stream: "Stream") -> None:
        """Put work at a stream's end, whatever is being captured."""
        with self.lock:
            stream.waiting.append(work)

    def wait(self, mark: Mark, why: str) -> None:
        """Let the host wait."""
        self.about_to_wait(why)
        favourites = self.rng.sample(self._streams, len(self._streams)) if self.rng.random() < 0.5 else []
        give_up_at = time.monotonic() + _PATIENCE_S
        while not mark.is_reached:
            with self.lock:
                is_going_on = mark.is_reached or self._do_one(favourites)
            if not is_going_on:
                assert time.monotonic() < give_up_at, "waits for what nobody has queued"
                time.sleep(_POLL_S)
        self.check()

    def about_to_wait(self, why: str) -> None:
        """Raise where the host must not wait."""
        if self.capture is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {why}")
        if getattr(self._of_thread, "is_hurried", False):
            raise Waited(why)
        self.check()

    def query(self, mark: Mark) -> bool:
        """Return whether mark is reached; time passes meanwhile."""
        if self.capture is not None:
            raise RuntimeError("operation not permitted when stream is capturing: a query")
        if not mark.is_reached:
            self._go_on(self.rng.randint(0, _MOST_PER_QUERY))
        self.check()
        return mark.is_reached

    def synchronize(self, device: object = None) -> None:
        """As torch.cuda.synchronize."""
        self.about_to_wait("synchronize")
        for mark in [stream.mark() for stream in self._streams]:
            self.wait(mark, "synchronize")

    def check(self) -> None:
        """Raise what has gone wrong on the device, over and over."""
        if self._fault is not None:
            raise RuntimeError(f"the device has failed: {self._fault!r}") from self._fault

    def _go_on(self, most: int) -> None:
        with self.lock:
            for _ in range(most):
                if not self._do_one([]):
                    return

    def _do_one(self, favourites: "list[Stream]") -> bool:
        """Do one piece of work that waits for nothing more, if there is any; return whether there was."""
        self.check()
        ready = [stream for stream in favourites if stream.is_ready]
        others = [] if ready else [stream for stream in self._streams if stream.is_ready]
        if not ready and not others:
            return False
        work = (ready[0] if ready else self.rng.choice(others)).waiting.popleft()
        try:
            with _disable_current_modes(), torch.inference_mode():
                work.run()
        except BaseException as error:
            self._fault = error
        return True


class Stream:
    """As torch.cuda.Stream."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self.waiting: deque[Work] = deque()

    @property
    def is_ready(self) -> bool:
        """Whether there is work that waits for nothing more."""
        after = self.waiting[0].after if self.waiting else None
        return bool(self.waiting) and (after is None or after.is_reached)

    @property
    def is_busy(self) -> bool:
        """Whether there is work that somebody has asked for."""
        return any(not work.is_upkeep for work in self.waiting)

    def mark(self) -> Mark:
        """Mark what is queued so far."""
        mark = Mark()
        self._timeline.queue(Work(mark.reach), self)
        return mark

    def wait_for(self, mark: Mark) -> None:
        """Let what is queued from now on wait."""
        self._timeline.queue(Work(lambda: None, mark), self)

    def wait_stream(self, stream: "Stream") -> None:
        self.wait_for(stream.mark())

    def wait_event(self, event: "Event") -> None:
        event.wait(self)

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or self._timeline.new_event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        self._timeline.wait(self.mark(), "Stream.synchronize")

    def query(self) -> bool:
        return self._timeline.query(self.mark())


class Event:
    """As torch.cuda.Event."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._mark = Mark()
        self._mark.reach()

    def record(self, stream: Stream | None = None) -> None:
        self._mark = (stream or self._timeline.current_stream()).mark()

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self._timeline.current_stream()).wait_for(self._mark)

    def query(self) -> bool:
        return self._timeline.query(self._mark)

    def synchronize(self) -> None:
        self._timeline.wait(self._mark, "Event.synchronize")

    def elapsed_time(self, later: "Event") -> float:
        """Everything takes a millisecond here."""
        self.synchronize()
        later.synchronize()
        return 1.0
