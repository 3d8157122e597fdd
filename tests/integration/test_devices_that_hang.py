"""Workers whose GPU stops to answer, in the midst of a step or of copying KV: the process is gone, soon.

The device is pretended (tests/pretend_cuda), one in each process. SIGUSR2 stops all its streams, SIGWINCH all but the
one that computes.
"""

import signal
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from protocol.request import SamplingParams
from tests.integration.lifelike_cluster import LifelikeCluster, live
from tests.models import make_model
from tests.pretend_cuda import streams
from tests.pretend_cuda.device import PretendCuda, pretended
from tests.pretend_cuda.operations import use_kernels
from tests.pretend_cuda.streams import Stream
from worker.dead_man_switch import FAILED_CLOSE_WITHIN_S
from worker.departure import WITHIN_S

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the place of torch.cuda is taken")

LEAST_S = 2.0
PATIENCE_S = 3.0  # of a busy machine
SHORT, LONG = (SamplingParams(max_tokens=num, seed=0, temperature=0.0) for num in (5, 200))


def live_on_a_gpu(encoded: bytes) -> None:
    patch = pytest.MonkeyPatch()
    with pretended(patch) as cuda:
        use_kernels(patch, cuda)
        signal.signal(signal.SIGUSR2, lambda *_: stop_streams(patch, cuda, computes=False))
        signal.signal(signal.SIGWINCH, lambda *_: stop_streams(patch, cuda, computes=True))
        live(encoded, LEAST_S)


def stop_streams(patch: pytest.MonkeyPatch, cuda: PretendCuda, computes: bool) -> None:
    """From now on no work is done, or none but that of the stream on which forward passes run."""
    is_ready, computing = Stream.is_ready.fget, cuda.timeline.default
    assert is_ready is not None
    patch.setattr(Stream, "is_ready", property(lambda self: computes and self is computing and is_ready(self)))
    patch.setattr(streams, "_PATIENCE_S", 1e6)


def test_a_worker_whose_gpu_stops_in_a_step_or_in_a_copy_ends_within_its_deadlines(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path, num_hidden_layers=1, max_position_embeddings=256)
    groups = [("prefill", 1, 1), ("decode", 1, 1)]
    sizes = {"memory_bytes": 1 << 20, "batch_tokens": 48, "batch_requests": 2}
    with LifelikeCluster(model, groups, live=live_on_a_gpu, device="cuda", **sizes) as cluster:
        stream = cluster.submit([1, 2, 3], LONG)
        cluster.wait_until(lambda: cluster.leader("decode", 0).load.running == 1)
        cluster.send("decode-0-rank0", signal.SIGUSR2)
        assert cluster.has_ended("decode-0-rank0", LEAST_S + PATIENCE_S)
        cluster.begin_next_lives()
        assert len(stream.result(30).token_ids) == LONG.max_tokens

        cluster.send("prefill-0-rank0", signal.SIGWINCH)
        stream = cluster.submit([4] * 40, SHORT)
        cluster.wait_until(lambda: cluster.leader("decode", 0).load.waiting > 0)
        with suppress(ProcessLookupError):  # where the main thread waits for the copies, that has ended it already
            cluster.send("prefill-0-rank0", signal.SIGTERM)
        assert cluster.has_ended("prefill-0-rank0", WITHIN_S + FAILED_CLOSE_WITHIN_S + PATIENCE_S)
        cluster.begin_next_lives()
        assert len(stream.result(30).token_ids) == SHORT.max_tokens
