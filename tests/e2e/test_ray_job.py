"""The cluster as a Ray job, submitted to a head that asks for a token; its code is the working directory alone."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.e2e.cluster_process import ROOT
from tests.e2e.processes import MarkedProcess

RAY = str(Path(sys.executable).with_name("ray"))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def head(ray_environment: dict[str, str]) -> Iterator[str]:
    """Yield the address of the head's dashboard."""
    port = free_port()
    command = [RAY, "start", "--head", "--block", "--num-cpus=2", "--num-gpus=0", "--disable-usage-stats"]
    command += ["--node-ip-address=127.0.0.1", f"--port={free_port()}", f"--dashboard-port={port}"]
    command += [f"--dashboard-agent-listen-port={free_port()}", f"--temp-dir={ray_environment['HOME']}/ray"]
    running = MarkedProcess(command, Path(ray_environment["HOME"]), ray_environment)
    try:
        running.wait_for_text("This command will now block", 60)
        yield f"http://127.0.0.1:{port}"
        running.process.terminate()
        running.wait(60)
        running.assert_nothing_left(30)
    finally:
        running.destroy()


def job(ray_environment: dict[str, str], head: str, *arguments: str) -> MarkedProcess:
    action, *rest = arguments
    return MarkedProcess([RAY, "job", action, f"--address={head}", *rest], ROOT, ray_environment)


@pytest.mark.slow
def test_a_client_without_the_token_is_turned_away(ray_environment: dict[str, str], head: str):
    stranger = {name: value for name, value in ray_environment.items() if not name.startswith("RAY_AUTH")}
    refused = subprocess.run(
        [RAY, "job", "list", f"--address={head}"],
        env={**os.environ, **stranger, "RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert refused.returncode != 0
    assert "oken authentication is enabled" in refused.stdout + refused.stderr


@pytest.mark.slow
def test_a_submitted_job_serves_and_ends_when_it_is_stopped(ray_environment: dict[str, str], head: str, model: Path):
    up = ["python", "-m", "cluster", "up", "configs/cpu_1p1d.yaml"]
    up += ["--set", f"model.path={model}", "--set", "router.port=0"]
    submitted = job(ray_environment, head, "submit", "--submission-id=serve", "--working-dir=.", "--", *up)
    try:
        url = submitted.wait_for_text("ready: ", 120)
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            answer = client.completions.create(model=str(model), prompt="Once upon a time", max_tokens=8)
        assert answer.usage is not None
        assert answer.usage.completion_tokens > 0
        stopping = job(ray_environment, head, "stop", "serve")
        assert stopping.wait(60) == 0, stopping.output
        stopping.destroy()
        submitted.wait(60)
        assert "stopped" in submitted.output
    finally:
        submitted.destroy()
