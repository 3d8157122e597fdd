"""docs/metrics.md explains everything that is counted: what appears in /metrics has a name that can be looked up."""

import re
from pathlib import Path

from prometheus_client import CollectorRegistry

from kv_transfer.receiver import COUNTERS
from protocol.topology import RouterSection
from router.controller import Controller
from router.launch import RouterLaunch
from router.metrics import ClusterMetrics, RequestMetrics
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
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "router").glob("*.py")]
    reasons = {reason for source in sources for reason in re.findall(r'(?:Drop\(|drops\[)"(\w+)"', source)}
    assert len(reasons) > 5
    assert reasons <= PAGE
