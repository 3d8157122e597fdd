"""docs/metrics.md explains everything that is counted: what appears in /metrics has a name that can be looked up."""

import asyncio
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.samples import Sample
from starlette.applications import Starlette
from starlette.routing import Route

from kv_transfer.receiver import COUNTERS
from protocol.topology import RouterSection
from router.control.controller import Controller
from router.front import pages
from router.front.metrics import ClusterMetrics, RequestMetrics
from router.front.work_pool import WorkPool
from router.launch import RouterLaunch
from tests.unit.test_roles import decode_role, fetching_role

ROOT = Path(__file__).parents[2]
PAGE = set(re.findall(r"`([^`\n]+)`", (ROOT / "docs/metrics.md").read_text(encoding="utf-8")))


def test_every_metric_is_explained() -> None:
    launch = RouterLaunch(
        section=RouterSection(), control_host="", model_folder="", model_name="", max_context=1, vocab_size=1, groups=()
    )
    registry = CollectorRegistry()
    RequestMetrics(registry, "model")
    registry.register(ClusterMetrics(Controller(launch), "model"))
    assert {metric.name for metric in registry.collect()} <= PAGE


def test_every_fault_of_a_frame_is_explained() -> None:
    assert set(COUNTERS) <= PAGE


def test_every_counter_of_a_role_is_explained() -> None:
    (prefill, *_), (decode, *_) = fetching_role(0), decode_role(4)
    assert {**prefill.counters, **decode.counters}.keys() <= PAGE


def test_every_reason_to_drop_a_message_is_explained() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "router").rglob("*.py")]
    reasons = {reason for source in sources for reason in re.findall(r'(?:Drop\(|drops\[)"(\w+)"', source)}
    assert len(reasons) > 5
    assert reasons <= PAGE


class PatientSamples(list[Sample]):
    """Cannot be written before others have had a turn."""

    def __init__(self) -> None:
        super().__init__([Sample("patient", {}, 1.0)])
        self.has_had_turn = threading.Event()

    def __iter__(self) -> Iterator[Sample]:
        assert self.has_had_turn.wait(10), "nobody else had a turn"
        return super().__iter__()


def test_streams_go_on_while_the_page_is_written() -> None:
    """That of a thousand groups takes a tenth of a second."""
    metric, samples = GaugeMetricFamily("patient", "Waits."), PatientSamples()
    metric.samples = samples

    class Collector:
        def collect(self) -> Iterator[Metric]:
            yield metric

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collector())
    app = Starlette(routes=[Route("/metrics", pages.metrics)])
    app.state.registry = registry
    app.state.serving = SimpleNamespace(metrics_writing=WorkPool("metrics", num_threads=1, max_waiting=0))

    async def scenario() -> str:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://router") as client:
            asking = asyncio.create_task(client.get("/metrics"))
            asyncio.get_running_loop().call_later(0.01, samples.has_had_turn.set)
            return (await asking).text

    assert "patient 1.0" in asyncio.run(scenario())
