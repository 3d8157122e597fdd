"""What stands in for a rank's device: it computes when a result is asked for, in the order of what was launched."""

from collections.abc import Callable, Sequence
from collections.abc import Sequence as SequenceOf
from functools import cached_property, partial

import torch

from engine.parked_kv import ParkedKV
from engine.sampler import Drawing, Drawn, Sampler, SamplingRow
from protocol.errors import GroupError
from protocol.orders import Batch, Discard, Park, Unpark
from tests.simulation.oracle import POISON, VOCAB_SIZE, OracleModel


class Poisoned(GroupError):
    """A request has ended the group that computed it."""


class OracleEngine:
    """A rank's engine: the leader's runs the batch over all caches, once every follower has got as far."""

    def __init__(self, model: OracleModel | None) -> None:
        self._model = model

    def forward(
        self, batch: Batch, drawn: torch.Tensor | None = None, layers_done: object = None
    ) -> Callable[[], torch.Tensor] | None:
        if POISON in batch.token_ids:
            raise Poisoned("this rank computes a token that ends it")
        return partial(self._model.forward, batch, drawn) if self._model else None


class LateDrawing:
    """Stands in for engine.sampler.Drawing: a step is computed when its tokens are asked for, and no earlier."""

    def __init__(self, compute: Callable[[], torch.Tensor], rows: SequenceOf[SamplingRow]) -> None:
        self._compute = compute
        self._rows = rows

    @cached_property
    def _drawing(self) -> Drawing:
        return Sampler(VOCAB_SIZE, torch.device("cpu")).draw(self._compute(), self._rows)

    @property
    def token_ids(self) -> torch.Tensor:
        return self._drawing.token_ids

    def collect(self) -> list[Drawn]:
        return self._drawing.collect()


class QueuedParkedKV(ParkedKV):
    """Copies in the order of a device's queue: what was launched before is computed before."""

    def __init__(self, planes: Sequence[torch.Tensor], finish_launched: Callable[[], None]) -> None:
        super().__init__(planes)
        self._finish_launched = finish_launched

    def execute(self, order: Park | Unpark | Discard) -> None:
        self._finish_launched()
        super().execute(order)
