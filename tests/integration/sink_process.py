"""A decode group in a process of its own: python -m tests.integration.sink_process TRANSPORT TP NUM_KV_HEADS BLOCK.

It prints its epoch and addresses, then for every line "SEED NUM_POSITIONS FIRST REQUEST_ID PREFILL_EPOCH TRANSFER_ID
SOURCE_TP" on stdin expects that transfer, and says what came of it. The prompt's KV and its block tables follow from
the seed on both sides. KV_DEVICE says where the caches are.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from protocol.identity import Attempt
from protocol.layout import Endpoint
from protocol.orders import Broken, ExpectBlocks, Received
from tests.integration.kv_groups import (
    NUM_BLOCKS,
    Sink,
    Source,
    attempt_between,
    layout,
    poll_for,
    poll_until,
    random_tokens,
    send_order,
)


def seeded_prompt(seed: int, num_kv_heads: int, num_positions: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return random_tokens(num_kv_heads, num_positions)


def seeded_table(seed: int, num_positions: int, block_size: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(NUM_BLOCKS, generator=generator)[: -(-num_positions // block_size)].tolist()


def serve(name: str, tensor_parallel: int, num_kv_heads: int, block_size: int) -> None:
    sink = Sink(name, layout(tensor_parallel, num_kv_heads, block_size=block_size))
    print(json.dumps([sink.epoch, list(sink.endpoint.addresses)]), flush=True)
    for line in sys.stdin:
        words = line.split()
        seed, num_positions, first = map(int, words[:3])
        attempt = Attempt(words[3], 0, int(words[4]), sink.epoch, int(words[5]))
        table = seeded_table(seed + 1, num_positions, block_size)
        sink.note(table, first, seeded_prompt(seed, num_kv_heads, num_positions))
        source = Endpoint(attempt.prefill_epoch, layout(int(words[6]), num_kv_heads), name, ("",) * int(words[6]))
        for receiver in sink.receivers:
            receiver.expect(ExpectBlocks(attempt, source, tuple(table), first, num_positions - first))
        print("expecting", flush=True)
        reports = poll_until([*sink.receivers], tensor_parallel, deadline_s=60)
        is_right = {type(report) for report in reports} == {Received} and sink.is_as_expected()
        print(json.dumps([is_right, sink.counters(), [str(report) for report in reports]]), flush=True)


class SinkProcess:
    """The other end of a decode group's stdin and stdout."""

    def __init__(self, process: "subprocess.Popen[str]", name: str, tensor_parallel: int, num_kv_heads: int, size: int):
        self.process = process
        self.layout = layout(tensor_parallel, num_kv_heads, block_size=size)
        self.epoch, addresses = self._said()
        self.endpoint = Endpoint(self.epoch, self.layout, name, tuple(addresses))

    def _said(self) -> list:
        assert self.process.stdout
        return json.loads(self.process.stdout.readline())

    def announce(self, source: Source, seed: int, num_positions: int, first: int = 0) -> Attempt:
        """Let the sink expect a prompt whose KV is in source's caches afterwards; return its attempt."""
        attempt = attempt_between(source, self)  # type: ignore[arg-type]
        words = (seed, num_positions, first, attempt.request_id, source.epoch, attempt.transfer_id)
        source.fill(
            self._table(source, seed, num_positions), seeded_prompt(seed, self.layout.planes[0].heads, num_positions)
        )
        print(*words, source.layout.tensor_parallel, file=self.process.stdin, flush=True)
        assert self.process.stdout
        assert self.process.stdout.readline() == "expecting\n"
        return attempt

    def send(self, source: Source, attempt: Attempt, seed: int, num_positions: int, first: int = 0) -> None:
        table = self._table(source, seed, num_positions)
        for sender in source.senders:
            sender.send(send_order(self, attempt, table, num_positions, first))  # type: ignore[arg-type]

    def transfer(self, source: Source, seed: int, num_positions: int, first: int = 0) -> dict[str, int]:
        """Send a prompt and wait until it has arrived byte for byte; return the sink's counters."""
        attempt = self.announce(source, seed, num_positions, first)
        self.send(source, attempt, seed, num_positions, first)
        is_right, counters, reports = self.outcome(source)
        assert is_right, reports
        return counters

    def outcome(self, source: Source) -> list:
        """Poll source until the sink has said what came of the transfer."""
        assert self.process.stdout
        os.set_blocking(self.process.stdout.fileno(), False)
        give_up_at = time.monotonic() + 60
        try:
            while not (line := self.process.stdout.readline()):
                broken = poll_for([*source.senders], 0.01)
                assert not broken, broken
                assert time.monotonic() < give_up_at
        finally:
            os.set_blocking(self.process.stdout.fileno(), True)
        return json.loads(line)

    @staticmethod
    def _table(source: Source, seed: int, num_positions: int) -> list[int]:
        return seeded_table(seed, num_positions, source.layout.block_size)


@contextmanager
def sink_process(
    name: str, tensor_parallel: int = 1, num_kv_heads: int = 2, block_size: int = 16, **environment: str
) -> Iterator[SinkProcess]:
    arguments = [name, str(tensor_parallel), str(num_kv_heads), str(block_size)]
    with subprocess.Popen(
        [sys.executable, "-m", "tests.integration.sink_process", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    ) as process:
        try:
            yield SinkProcess(process, name, tensor_parallel, num_kv_heads, block_size)
        finally:
            process.kill()


def broken_attempts(reports: list) -> set[Attempt]:
    return {report.attempt for report in reports if isinstance(report, Broken)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(sys.argv[1], *map(int, sys.argv[2:5]))
