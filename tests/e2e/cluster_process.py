"""A cluster as a user has it: `python -m cluster up` in a process of its own, reached over HTTP only."""

import json
import signal
import sys
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import openai

from tests.e2e.processes import MarkedProcess, wait_for

ROOT = Path(__file__).parents[2]
START_S = 120.0

Worker = dict[str, Any]


class ClusterProcess:
    """Started and ready. environment: what the command has otherwise than this process."""

    def __init__(self, config: str, model: Path, *overrides: str, environment: Mapping[str, str] | None = None) -> None:
        overrides = (f"model.path={model}", "router.port=0", "router.grace_s=20", *overrides)
        sets = [word for override in overrides for word in ("--set", override)]
        command = [sys.executable, "-m", "cluster", "up", f"configs/{config}", *sets]
        self.processes = MarkedProcess(command, ROOT, environment)
        self.model = str(model)
        self._clients: list[openai.OpenAI] = []
        try:
            self.url = self.processes.wait_for_text("ready: ", START_S)
        except BaseException:
            self.processes.destroy()
            raise

    def client(self, **options: Any) -> openai.OpenAI:
        """Return OpenAI's client; it does not retry, so that tests see every failure."""
        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60, **options)
        self._clients.append(client)
        return client

    def status(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.url}/status", timeout=10) as answer:
            return dict(json.load(answer))

    def workers(self) -> list[Worker]:
        return list(self.status()["workers"])

    def worker(self, role: str, group: int = 0, rank: int = 0) -> Worker:
        return next(w for w in self.workers() if (w["role"], w["group"], w["rank"]) == (role, group, rank))

    def wait_until_back(self, before: Worker, deadline_s: float) -> Worker:
        """Return the next life of a worker, once it is ready."""

        def look() -> Worker | None:
            now = self.worker(before["role"], before["group"], before["rank"])
            return now if now["epoch"] != before["epoch"] and now["state"] == "ready" else None

        return wait_for(look, deadline_s, f"{before['role']} {before['group']} is back")

    def wait_until_pools_whole(self, deadline_s: float = 10.0) -> None:
        """Fail when, with no request left, any block of any pool is still held."""

        def look() -> bool:
            pools = [worker["blocks"] for worker in self.workers() if worker["rank"] == 0]
            return all(pool["held"] == 0 and pool["free"] + pool["cached"] == pool["total"] > 0 for pool in pools)

        try:
            wait_for(look, deadline_s, "every block is free or cached")
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.status()}") from None

    def stop(self, deadline_s: float = 40.0) -> int:
        """Ask it to stop and return its exit code."""
        if self.processes.process.poll() is None:
            self.processes.process.send_signal(signal.SIGTERM)
        return self.processes.wait(deadline_s)

    def tear_down(self) -> None:
        """Stop it; fail when that is not clean, when a block is still held, or when something is left behind."""
        try:
            self.wait_until_pools_whole()
            assert self.stop() == 0, self.processes.output
            self.processes.assert_nothing_left()
        finally:
            self.destroy()

    def destroy(self) -> None:
        """End whatever is left, without questions."""
        for client in self._clients:
            client.close()
        self.processes.destroy()
