"""How fast KV goes from one process to another, per transport, beside what the machine can do at all.

    python -m benchmarks.transfer [--layers 8] [--tokens 512 2048 8192] [--transports shm zmq gloo] [--rounds 5]
                                  [--device cpu]

An 8B-like layout (8 KV heads of 128, bfloat16) with fewer layers, so that two caches fit a small machine. Sender and
receiver are processes of their own; a transfer is timed from the order to send until every block is in the receiver's
cache: gathered from scattered blocks, digested, moved, checked, scattered. Rounds interleave all rows, and medians are
shown. Anchors, in the same rounds (transfer_anchors.py): memcpy (one copy of as many bytes), paged (gather and scatter
in one process), tcp and raw gloo (a plain stream of as many bytes between two processes, over a socket and over the
library that the transport of that name stands on), digest (what either end spends on digests of as many
bytes; the column of that name is its share of a transfer's time).

exposed: the prompt is "computed" in chunks of a quarter, by matrix products that take about as long as its transfer
did, and each chunk is sent when it is done, while the next is computed. Shown is what is left after the last chunk, in
milliseconds and as a share of the transfer's time alone: 1.00 would be no overlap at all, and 0.25 is the least, for
the last quarter itself.
"""

import argparse
import gc
import os
import select
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import msgspec
import torch

from benchmarks.child_process import Child, child, said
from benchmarks.transfer_anchors import HOST, TIMEOUT_S, Run, block_table, digest, memcpy, paged, stream, synchronize
from kernels.heap import keep_freed_memory
from kv_transfer.plan import manifest_of
from kv_transfer.receiver import KVReceiver
from kv_transfer.sender import KVSender
from kv_transfer.transports.opening import open_receiver, open_sender
from kv_transfer.transports.transport import Site
from protocol.identity import Attempt, new_attempt, new_epoch, new_request_id
from protocol.layout import Endpoint, KVLayout, keys_and_values
from protocol.orders import ExpectBlocks, Received, SendBlocks, SendMore

NUM_CHUNKS = 4
SECRET = b"the benchmark's own"


def layout(num_layers: int) -> KVLayout:
    return KVLayout("benchmark", num_layers, keys_and_values(8, 128, "bfloat16"), 16, 1)


def new_cache(shape: KVLayout, num_tokens: int, device: torch.device) -> list[torch.Tensor]:
    """Return the planes of a cache of random bits with every page touched."""
    return [
        torch.randint(-(2**15), 2**15, size, dtype=torch.int16, device=device).view(torch.bfloat16)
        for size in shape.rank_shapes(0, num_tokens // shape.block_size)
    ]


class Receiving:
    """The receiving process: what it is told comes on stdin, one line per transfer."""

    def __init__(self, name: str, num_layers: int, num_tokens: int, device: torch.device) -> None:
        self._layout = layout(num_layers)
        self._cache = new_cache(self._layout, num_tokens, device)
        transport = open_receiver(name, Site(HOST, device, self._layout, TIMEOUT_S, SECRET))  # type: ignore[arg-type]
        self._receiver = KVReceiver(self._cache, self._layout, 0, transport)
        self._name = name

    def run(self) -> None:
        print(self._receiver.address, flush=True)
        for line in sys.stdin:
            request_id, source, destination, transfer_id, num_tokens = line.split()
            attempt = Attempt(request_id, 0, int(source), int(destination), int(transfer_id))
            table = tuple(block_table(int(num_tokens), self._cache[0].shape[1], 2).tolist())
            endpoint = Endpoint(attempt.prefill_epoch, self._layout, self._name, ("",))
            self._receiver.expect(ExpectBlocks(attempt, endpoint, table, 0, int(num_tokens)))
            print("expecting", flush=True)
            while Received(0, attempt) not in self._receiver.poll():
                select.select([self._receiver], [], [], 1)
            synchronize(self._cache[0].device)
            print("received", flush=True)


@contextmanager
def transport(name: str, cache: list[torch.Tensor], shape: KVLayout) -> Iterator["Transport"]:
    """Yield one transport to a process of its own."""
    device, num_tokens = cache[0].device, cache[0].shape[1] * shape.block_size
    sender = KVSender(cache, shape, 0, open_sender(name, Site(HOST, device, shape, TIMEOUT_S, SECRET)))  # type: ignore[arg-type]
    arguments = ("--receive", name, "--layers", shape.num_layers, "--tokens", num_tokens, "--device", device)
    with child("benchmarks.transfer", *arguments) as process:
        endpoint = Endpoint(new_epoch(), shape, name, (said(process),))
        yield Transport(sender, process, endpoint, cache)
        sender.close()


class Transport:
    """The sending end of one transport; a Run when called."""

    def __init__(self, sender: KVSender, process: Child, endpoint: Endpoint, cache: list[torch.Tensor]) -> None:
        self._sender = sender
        self._process = process
        self._endpoint = endpoint
        self._num_blocks = cache[0].shape[1]

    def __call__(self, num_tokens: int) -> float:
        order = self._announce(num_tokens)
        began = time.perf_counter()
        self._sender.send(order)
        self._await_received()
        return time.perf_counter() - began

    def exposed(self, num_tokens: int, compute_s: float) -> float:
        """Return the seconds from the last chunk computed to the whole prompt received."""
        order = msgspec.structs.replace(self._announce(num_tokens), num_computed=0)
        self._sender.send(order)
        for chunk in range(1, NUM_CHUNKS + 1):
            compute(compute_s / NUM_CHUNKS)
            computed_at = time.perf_counter()
            self._sender.poll()
            self._sender.send_more(SendMore(order.attempt, num_tokens * chunk // NUM_CHUNKS))
        self._await_received()
        return time.perf_counter() - computed_at

    def _announce(self, num_tokens: int) -> SendBlocks:
        attempt = new_attempt(new_request_id(), 0, 1, self._endpoint.epoch)
        words = (attempt.request_id, 1, self._endpoint.epoch, attempt.transfer_id, num_tokens)
        print(*words, file=self._process.stdin, flush=True)
        assert said(self._process) == "expecting"
        table = tuple(block_table(num_tokens, self._num_blocks, 1).tolist())
        return SendBlocks(attempt, self._endpoint, table, 0, num_tokens)

    def _await_received(self) -> None:
        assert self._process.stdout
        while True:
            ready, _, _ = select.select([self._sender, self._process.stdout], [], [], TIMEOUT_S)
            reports = self._sender.poll()
            if reports or not ready:
                raise SystemExit(f"the transfer broke: {reports or 'nothing came'}")
            if self._process.stdout in ready:
                assert said(self._process) == "received"
                return


def compute(seconds: float) -> None:
    """Keep one core busy, as a forward pass does."""
    matrix = torch.ones(256, 256)
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        torch.mm(matrix, matrix)


Seconds = dict[str, dict[int, list[float]]]
"""By row and number of tokens, one per round."""


def measure(
    names: list[str], num_layers: int, lengths: list[int], rounds: int, device: torch.device
) -> tuple[Seconds, Seconds]:
    """Return seconds of whole transfers and of exposed tails; the first round warms up and is not counted."""
    shape = layout(num_layers)
    cache = new_cache(shape, max(lengths), device)
    token_bytes = manifest_of(shape, shape, 0, 1).num_bytes
    with ExitStack() as stack:
        rows: dict[str, Run] = {"memcpy": stack.enter_context(memcpy(cache))}
        rows["paged"] = stack.enter_context(paged(cache))
        for kind, title in (("tcp", "tcp"), ("gloo", "raw gloo")):
            rows[title] = stack.enter_context(stream(kind, token_bytes))
        rows["digest"] = stack.enter_context(digest(cache[0], shape))
        rows |= {name: stack.enter_context(transport(name, cache, shape)) for name in names}
        seconds: Seconds = {name: {length: [] for length in lengths} for name in rows}
        tails: Seconds = {name: {length: [] for length in lengths} for name in names}
        for number in range(rounds + 1):
            for length in lengths:
                for name, run in rows.items():
                    elapsed = run(length)
                    tail = run.exposed(length, elapsed) if isinstance(run, Transport) else None
                    if number:
                        seconds[name][length].append(elapsed)
                        if tail is not None:
                            tails[name][length].append(tail)
    return seconds, tails


def show(seconds: Seconds, tails: Seconds, token_bytes: int) -> None:
    """Ratios are medians over rounds of ratios within a round, for the machine may be busy with other things."""
    titles = f"{'ms':>9}{'GB/s':>7}{'x memcpy':>10}{'x paged':>9}{'x tcp':>7}{'exposed ms, share':>20}{'digest':>8}"
    print(f"{'':9}{'tokens':>7}{'MB':>6}{titles}")
    for name, of in seconds.items():
        for length, elapsed in of.items():
            num_bytes, median = length * token_bytes, statistics.median(elapsed)
            against = [ratio(seconds[anchor][length], elapsed) for anchor in ("memcpy", "paged", "tcp")]
            figures = f"{num_bytes / 1e6:6.0f}{median * 1e3:9.2f}{num_bytes / median / 1e9:7.2f}"
            tail = ""
            if name in tails:
                tail = f"{statistics.median(tails[name][length]) * 1e3:12.2f}{ratio(tails[name][length], elapsed):8.2f}"
                tail += f"{ratio(seconds['digest'][length], elapsed):8.3f}"
            print(f"{name:9}{length:7}{figures}{against[0]:10.2f}{against[1]:9.2f}{against[2]:7.2f}{tail}")


def ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(one / other for one, other in zip(ours, theirs, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--transports", nargs="+", default=["shm", "zmq", "gloo"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda:0")
    parser.add_argument("--receive", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    gc.freeze()  # as workers do
    if options.device.type == "cpu":
        keep_freed_memory()  # as they do, too
    else:
        for variable, value in {"NCCL_HOSTID": "sender", "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}.items():
            os.environ.setdefault(variable, value)
    if options.receive:
        Receiving(options.receive, options.layers, options.tokens[0], options.device).run()
    else:
        shape = layout(options.layers)
        seconds, tails = measure(options.transports, options.layers, options.tokens, options.rounds, options.device)
        show(seconds, tails, manifest_of(shape, shape, 0, 1).num_bytes)


if __name__ == "__main__":
    main()
