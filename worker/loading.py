"""A rank gets its model, its KV cache and the part that moves its blocks. Called once in a worker's life."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.engine import Engine
from engine.limits import KVMemory, Limits, ShareOfFree
from engine.parked_kv import ParkedKV
from engine.rank import Rank
from engine.trial import try_out
from models.checkpoint import open_checkpoint
from models.facts import ModelFacts
from models.files import find_model
from models.fingerprint import StampedFiles
from models.loading import load_model
from models.tensor_parallel import TensorParallel
from protocol.errors import ConfigError
from protocol.layout import KVLayout, keys_and_values
from protocol.progress import Tell
from worker.assembly import ASSEMBLIES, Cache
from worker.launch import CacheLaunch, WorkerLaunch


@dataclass(frozen=True)
class LoadedRank:
    """A rank that is ready to carry out orders, how its group lays out KV, and for how long a step may be silent."""

    engine: Engine
    rank: Rank
    layout: KVLayout
    longest_gap_s: float


def load_rank(
    launch: WorkerLaunch, tensor_parallel: TensorParallel, progress: Tell, pulse: Callable[[], None]
) -> LoadedRank:
    """Load this rank's slices of the weights, try them out and open its mover. pulse: see Rank.

    Raise ConfigError for a model that is not served.
    """
    folder = find_model(launch.model.path, progress=progress)
    files = StampedFiles(folder)
    model = load_model(folder)
    dtype, device = model.facts.served_dtype(launch.model.dtype), torch.device(launch.device)
    torch_dtype: torch.dtype = getattr(torch, dtype)
    limits = Limits(launch.role_section.batch_tokens, launch.role_section.batch_requests, launch.model.max_context)
    checkpoint = open_checkpoint(folder, model.decoder, torch_dtype, device)
    fingerprint = files.fingerprint(max(1, int(launch.role_section.cpus)), progress)
    layout = _layout(model.facts, fingerprint, dtype, launch)
    engine = Engine(
        model,
        checkpoint,
        torch_dtype,
        device,
        tensor_parallel,
        layout,
        _kv_memory(launch.kv_cache),
        limits,
        progress,
    )
    files.check_unchanged()
    _check_same_model(fingerprint, tensor_parallel, device)
    progress("trying the model out")
    longest_gap_s = try_out(engine, limits, launch.kv_cache.block_size)
    planes = engine.kv_cache.planes
    mover = ASSEMBLIES[launch.role].mover(launch, Cache(planes, layout, launch.rank))
    rank = Rank(engine, ParkedKV(planes), mover, pulse)
    return LoadedRank(engine, rank, layout, longest_gap_s)


def _kv_memory(launch: CacheLaunch) -> KVMemory:
    return ShareOfFree(launch.share_of_free) if launch.memory_bytes is None else launch.memory_bytes


def _check_same_model(fingerprint: str, tensor_parallel: TensorParallel, device: torch.device) -> None:
    """Ranks on several hosts read several copies of the model."""
    if not tensor_parallel.is_same(int(fingerprint[:15], 16), device):
        raise ConfigError(f"the ranks of this group have different models; this one's fingerprint is {fingerprint}")


def _layout(facts: ModelFacts, fingerprint: str, dtype: str, launch: WorkerLaunch) -> KVLayout:
    return KVLayout(
        model_hash=fingerprint,
        num_layers=facts.num_layers,
        planes=keys_and_values(facts.num_kv_heads, facts.head_dim, dtype),
        block_size=launch.kv_cache.block_size,
        tensor_parallel=launch.role_section.tensor_parallel,
    )
