"""CUDA graphs of the pretended device: what is launched while one is captured is noted down, and repeated as noted.

So is that memory is rubbish when it is taken and when it is given back, at every replay.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.pretend_cuda.memory import Allocator, Pool
from tests.pretend_cuda.streams import Mark, Stream, Timeline, Work


class Graph:
    """As torch.cuda.CUDAGraph."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._works: list[Work] = []
        self._is_whole = False
        self.pool: Pool
        self.stream: Stream

    def record(self, work: Work) -> None:
        assert not isinstance(work.after, Mark), "work of other streams cannot be waited for in a graph here"
        self._works.append(work)

    def replay(self) -> None:
        if not self._is_whole:
            raise RuntimeError("replay of a graph that was not captured")
        stream = self._timeline.current_stream()
        for work in self._works:
            self._timeline.queue(work, stream)

    @contextmanager
    def made_on(self, stream: Stream, pool: Pool) -> Iterator[None]:
        """Capture what this thread launches on stream."""
        if stream is self._timeline.default:
            raise RuntimeError("no graph can be captured on the default stream")
        self.stream, self.pool = stream, pool
        with self._timeline.on_stream(stream), self._timeline.capturing(self):
            yield
        self._is_whole = True


class Graphs:
    """What torch.cuda has for graphs."""

    def __init__(self, timeline: Timeline, allocator: Allocator) -> None:
        self._timeline = timeline
        self._allocator = allocator
        self._stream = timeline.new_stream()

    def new(self, keep_graph: bool = False) -> Graph:
        """As torch.cuda.CUDAGraph."""
        return Graph(self._timeline)

    def pool_handle(self) -> Pool:
        """As torch.cuda.graph_pool_handle."""
        return self._allocator.new_pool()

    @contextmanager
    def capture(
        self, graph: Graph, pool: Pool | None = None, stream: Any = None, capture_error_mode: str = "global"
    ) -> Iterator[None]:
        """As torch.cuda.graph."""
        self._timeline.synchronize()
        self._allocator.empty_cache()
        with graph.made_on(stream or self._stream, pool or self._allocator.new_pool()):
            yield
