"""`make bench-router`: what the router costs, with workers that cost and wait for nothing.

The real router process, over HTTP, and workers of benchmarks/router_workers.py in processes of their own. Streams: the
processor time of all the router's threads for a request of 64 streamed tokens, which come every 10 ms, and the time
from a request to its first token, all of which is the router's, the network's, the client's and the fake worker's.
Groups: processor time in a second in which groups of eight ranks send heartbeats and nothing else happens; of a choice
among them; of one look at /metrics and /status; and what it takes when all start, and are lost, at once.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.child_process import Child, child, said
from benchmarks.router_workers import MAX_TOKENS
from protocol.identity import new_attempt
from protocol.layout import Endpoint, KVLayout, keys_and_values
from protocol.request import Request, SamplingParams
from protocol.topology import RouterSection
from router.control.dispatch import Dispatcher
from router.control.policies import POLICIES, ReadyGroup
from router.launch import Addresses, GroupSpec, RouterLaunch

MODEL = Path("configs/demo_model")
VOCAB_SIZE = 2048
STEP_MS = 10
NUM_TOKENS = 64
SIZE = 8
WATCH_S = 5.0


class Router:
    """The router's process, and its clock."""

    def __init__(self, process: "subprocess.Popen[bytes]", addresses: Addresses) -> None:
        self._pid = process.pid
        self.control = addresses.control
        self._host = addresses.http.removeprefix("http://")

    def processor_s(self) -> float:
        """Return the processor time of all its threads so far."""
        schedules = Path(f"/proc/{self._pid}/task").glob("*/schedstat")
        return sum(int(schedule.read_text().split()[0]) for schedule in schedules) / 1e9

    def connect(self) -> HTTPConnection:
        return HTTPConnection(self._host, timeout=60)

    def get(self, path: str) -> bytes:
        connection = self.connect()
        connection.request("GET", path)
        answer = connection.getresponse().read()
        connection.close()
        return answer

    def await_answer(self, path: str, wanted: str) -> None:
        """Look at path until what is wanted is in the answer."""
        while wanted not in self.get(path).decode():
            time.sleep(0.05)


@contextmanager
def router(num_groups: int, size: int) -> Iterator[Router]:
    groups = [GroupSpec(role, number, size) for role in ("prefill", "decode") for number in range(num_groups)]
    launch = RouterLaunch(
        section=RouterSection(port=0, canary_s=0),
        control_host="127.0.0.1",
        model_folder=str(MODEL.resolve()),
        model_name="fake",
        max_context=1 << 20,
        vocab_size=VOCAB_SIZE,
        groups=tuple(groups),
    )
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    quiet = os.environ | {"TANDEM_LOG_LEVEL": "ERROR"}
    with subprocess.Popen([sys.executable, "-m", "router"], env=quiet, **pipes) as process:
        process.stdin.write(msgspec.json.encode(launch) + b"\n")
        process.stdin.flush()
        try:
            yield Router(process, msgspec.json.decode(process.stdout.readline(), type=Addresses))
        finally:
            process.kill()


@contextmanager
def workers(router: Router, num_groups: int, size: int) -> Iterator[list[Child]]:
    """Workers that are made, and join when told to; one process has not enough open files for all."""
    with ExitStack() as stack:
        words = router.control, num_groups, size, STEP_MS
        processes = [
            stack.enter_context(child("benchmarks.router_workers", words[0], role, *words[1:]))
            for role in ("prefill", "decode")
        ]
        assert [said(process) for process in processes] == ["made", "made"]
        yield processes


def let_join(processes: list[Child]) -> None:
    """Return when all are ready."""
    for process in processes:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    assert [said(process) for process in processes] == ["ready", "ready"]


def stream(router: Router, connection: HTTPConnection, num_tokens: int) -> float:
    """Read a whole stream; return the seconds until its first token."""
    body = {"prompt": [5] * 32, "max_tokens": num_tokens, "stream": True, "temperature": 0}
    began = time.perf_counter()
    connection.request("POST", "/v1/completions", msgspec.json.encode(body))
    answer = connection.getresponse()
    answer.readline()
    first_s = time.perf_counter() - began
    answer.read()
    return first_s


def streams(router: Router, num_clients: int, num_requests: int) -> float:
    """Return the router's processor time per request, with so many clients that ask again and again."""

    def ask() -> None:
        connection = router.connect()
        for _ in range(num_requests):
            stream(router, connection, NUM_TOKENS)
        connection.close()

    before = router.processor_s()
    threads = [threading.Thread(target=ask) for _ in range(num_clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return (router.processor_s() - before) / num_clients / num_requests


def first_tokens(router: Router, num_others: int, num_probes: int = 100) -> list[float]:
    """Return the seconds to the first token of requests that come one after another while others stream."""
    others = [router.connect() for _ in range(num_others)]
    for connection in others:
        body = {"prompt": [5] * 32, "max_tokens": 100_000, "stream": True}
        connection.request("POST", "/v1/completions", msgspec.json.encode(body))
    probe = router.connect()
    stream(router, probe, 2)
    times = sorted(stream(router, probe, 2) for _ in range(num_probes))
    for connection in [*others, probe]:
        connection.close()
    return times


def choice_s(num_groups: int) -> float:
    """Return the processor time of a choice among so many groups of either role, with what it leads to."""
    dispatcher = Dispatcher(POLICIES["least_loaded"])
    layout = KVLayout("model", 32, keys_and_values(8, 128, "bfloat16"), 16, SIZE)
    groups = [ReadyGroup(n, n + 1, Endpoint(n + 1, layout, "zmq", ()), MAX_TOKENS) for n in range(2 * num_groups)]
    dispatcher.pair_up(groups[:num_groups], groups[num_groups:])
    return _timed_choices(dispatcher)


def _timed_choices(dispatcher: Dispatcher, count: int = 2000) -> float:
    request = Request("r", (5,) * 32, SamplingParams(max_tokens=64, seed=1))
    began = time.thread_time()
    for number in range(count):
        pair = dispatcher.choose(request)
        attempt = new_attempt(str(number), 0, pair.prefill.epoch, pair.decode.epoch)
        dispatcher.started(attempt, request)
        if number % 3:
            dispatcher.prefilled(attempt)
        if number % 3 == 1:
            dispatcher.ended(attempt)
    return (time.thread_time() - began) / count


def report_streams() -> None:
    with router(1, 1) as running, workers(running, 1, 1) as processes:
        let_join(processes)
        running.await_answer("/ready", '"ready"')
        streams(running, 4, 5)  # warm-up
        for num_clients, num_requests in ((1, 10), (16, 10), (50, 6)):
            request_s = streams(running, num_clients, num_requests)
            print(f"{num_clients:4} streams: {request_s * 1e3:.2f} ms of processor time per request", flush=True)
        for num_others in (0, 50):
            times = first_tokens(running, num_others)
            median_ms, most_ms = statistics.median(times) * 1e3, times[len(times) * 9 // 10] * 1e3
            print(
                f"first token beside {num_others} streams: {median_ms:.2f} ms, 9 of 10 within {most_ms:.2f}", flush=True
            )


class Cost:
    """Prints what the router spent while entered."""

    def __init__(self, router: Router, name: str) -> None:
        self._router = router
        self._name = name

    def __enter__(self) -> None:
        self._began_s, self._spent_s = time.perf_counter(), self._router.processor_s()

    def __exit__(self, *_: object) -> None:
        wall_s, spent_s = time.perf_counter() - self._began_s, self._router.processor_s() - self._spent_s
        print(f"  {self._name}: {spent_s:.3f} s of processor time within {wall_s:.3f} s", flush=True)


def report_groups(num_groups: int) -> None:
    """Half of them prefill, half of them decode."""
    print(f"{num_groups} groups of TP{SIZE}\n  a choice: {choice_s(num_groups // 2) * 1e6:.0f} us", flush=True)
    with router(num_groups // 2, SIZE) as running, workers(running, num_groups // 2, SIZE) as processes:
        with Cost(running, "start"):
            let_join(processes)
            running.await_answer("/ready", '"ready"')
        time.sleep(1)
        with Cost(running, "heartbeats"):
            time.sleep(WATCH_S)
        for path in ("/metrics", "/status"):
            with Cost(running, path):
                running.get(path)
        for process in processes:
            process.kill()
        with Cost(running, "loss"):
            running.await_answer("/ready", "no prefill and no decode worker is ready")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, nargs="*", default=[50, 200], help="how many to measure with")
    arguments = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores")
    report_streams()
    for num_groups in arguments.groups:
        report_groups(num_groups)


if __name__ == "__main__":
    main()
