"""A cluster over two hosts of a Ray cluster, whose network is cut and mended."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.cluster_process import ClusterProcess
from tests.e2e.conftest import Truth
from tests.e2e.hosts import Host, Network
from tests.e2e.processes import MarkedProcess, wait_for

RAY = str(Path(sys.executable).with_name("ray"))
STORY = "Once upon a time there was a lighthouse keeper who counted the ships that passed. "
RAY_PORT = 6379
NUM_TOKENS = 24
WHOLE_CONTEXT = 1000
LOST_WITHIN_S = 15.0
BACK_S = 90.0


@pytest.fixture
def network() -> Iterator[Network]:
    try:
        made = Network(2)
    except OSError as error:
        pytest.skip(f"cannot make hosts here, which takes root and iproute2: {error}")
    yield made
    made.close()


def ray_node(environment: dict[str, str], host: Host, *options: str) -> MarkedProcess:
    """Start Ray on host, with files of its own."""
    command = [RAY, "start", "--block", "--num-gpus=0", "--disable-usage-stats", *options]
    command += [f"--node-ip-address={host.address}", f"--temp-dir={environment['HOME']}/{host.name}"]
    with host.entered():
        node = MarkedProcess(command, Path(environment["HOME"]), environment)
    try:
        node.wait_for_text("This command will now block", 60)
    except BaseException:
        node.destroy()
        raise
    return node


@pytest.fixture
def ray_nodes(network: Network, ray_environment: dict[str, str]) -> Iterator[list[MarkedProcess]]:
    """Prefill has room on the first host only, and decode then on the second."""
    first, second = network.hosts
    with ExitStack() as cleanup:
        head = ray_node(
            ray_environment, first, "--head", f"--port={RAY_PORT}", "--include-dashboard=false", "--num-cpus=2"
        )
        cleanup.callback(head.destroy)
        other = ray_node(ray_environment, second, f"--address={first.address}:{RAY_PORT}", "--num-cpus=1")
        cleanup.callback(other.destroy)
        yield [head, other]


@pytest.fixture
def cluster(
    network: Network, ray_nodes: list[MarkedProcess], ray_environment: dict[str, str], model: Path
) -> Iterator[ClusterProcess]:
    """The router is on the first host, and so is this thread."""
    first = network.hosts[0]
    environment = {**ray_environment, "RAY_ADDRESS": f"{first.address}:{RAY_PORT}"}
    overrides = ("prefill.cpus=2", "decode.cpus=1", "kv_transfer.transport=auto")
    with first.entered():
        running = ClusterProcess("cpu_1p1d.yaml", model, *overrides, environment=environment)
        yield running
        running.tear_down()
        wait_for(lambda: not ranks_among(ray_nodes), 10, "no rank is left on any host")


def ranks_among(ray_nodes: list[MarkedProcess]) -> list[str]:
    names = [name for node in ray_nodes for name in node.descendants()]
    return [name for name in names if "ray::prefill" in name or "ray::decode" in name]


def ask(cluster: ClusterProcess, prompt: Any, num_tokens: int, **options: Any) -> Any:
    return cluster.client().completions.create(
        model=cluster.model,
        prompt=prompt,
        max_tokens=num_tokens,
        temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True},
        **options,
    )


@pytest.mark.slow
def test_answers_are_right_and_a_cut_network_makes_streams_wait_until_it_is_mended(
    cluster: ClusterProcess,
    network: Network,
    ray_nodes: list[MarkedProcess],
    tokenize: Callable[[str], list[int]],
    truth: Truth,
):
    prompt = tokenize(STORY)
    assert [cluster.worker(role)["node"] for role in ("prefill", "decode")] == ["host1", "host2"]
    assert len(ranks_among(ray_nodes)) == 2
    assert list(ask(cluster, prompt, NUM_TOKENS).choices[0].token_ids) == truth(prompt, NUM_TOKENS)
    wait_for(lambda: cluster.worker("prefill")["transports"] == ["zmq"], 5, "shared memory does not reach so far")

    before = cluster.worker("decode")
    stream = iter(ask(cluster, prompt, WHOLE_CONTEXT - len(prompt), stream=True, timeout=BACK_S))
    next(stream)
    network.pull(network.hosts[1])
    wait_for(lambda: cluster.worker("decode")["state"] == "dead", LOST_WITHIN_S, "it is given up")
    network.plug(network.hosts[1])
    assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
    cluster.wait_until_back(before, BACK_S)
    assert list(ask(cluster, prompt, NUM_TOKENS).choices[0].token_ids) == truth(prompt, NUM_TOKENS)
