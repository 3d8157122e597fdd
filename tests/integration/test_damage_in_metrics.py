"""KV frames that are damaged on the wire: nothing of them reaches an answer, and /metrics names what happened.

Real workers over real sockets; only what KVSender gives to its transport passes through the test's hands. The names are
those that docs/metrics.md explains.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest

import kv_transfer.plan
from kv_transfer.frames import FrameHeader, encode_header
from kv_transfer.receiver import KVReceiver
from kv_transfer.sender import KVSender
from kv_transfer.transports import connected_peer
from kv_transfer.transports.opening import open_sender
from kv_transfer.transports.transport import OutgoingFrame, Settled, Site
from protocol.request import SamplingParams
from router.front.metrics import ClusterMetrics
from tests.integration.test_transports_faults import GARBAGE, say
from tests.models import make_model
from tests.worker_cluster import WorkerCluster

torch.set_num_threads(1)
FRAME_BYTES = 16 << 10
PROMPT = [index * 7 % 500 for index in range(150)]
GREEDY = SamplingParams(max_tokens=6, seed=0, temperature=0.0)
FLIPPED, OLD = 98, 99
"""Attempts of these numbers get a header with a flipped bit, or one of another version."""


class Wire:
    """A real SendingTransport; of one frame a test decides what becomes. Of what it adds KVSender hears nothing."""

    def __init__(self, name: str, site: Site) -> None:
        self.name = name
        self.damage: Callable[[Wire, OutgoingFrame], None] | None = None
        self.settled = self
        self.counters: dict[str, int] = {}
        self._transport = real = open_sender(name, site)  # type: ignore[arg-type]
        self._late: OutgoingFrame | None = None
        self._added: list[FrameHeader] = []
        self.staging, self.drop, self.close_peer, self.close = real.staging, real.drop, real.close_peer, real.close
        self.fileno, self.ring = real.settled.fileno, real.settled.ring

    def send(self, frame: OutgoingFrame) -> None:
        frame = frame.sealed()
        damage, self.damage = self.damage, None
        if damage:
            damage(self, frame)
            return
        late, self._late = self._late, None
        self._transport.send(frame)
        if late:
            self._transport.send(late)

    def send_late(self, frame: OutgoingFrame) -> None:
        """Send it after the next one."""
        self._late = frame

    def add(self, frame: OutgoingFrame) -> None:
        """Send one more frame, of which KVSender knows nothing."""
        self._added.append(frame.header)
        self._transport.send(frame._replace(payload=frame.payload.clone()))

    def take(self, max_bytes: int) -> list[Settled]:
        return [settled for settled in self._transport.settled.take(max_bytes) if not self._is_added(settled)]

    def _is_added(self, settled: Settled) -> bool:
        if settled.frame.header not in self._added:
            return False
        self._added.remove(settled.frame.header)
        return True


def cut(wire: Wire, frame: OutgoingFrame) -> None:
    wire.send(frame._replace(payload=frame.payload[:-4].clone()))


def flip(wire: Wire, frame: OutgoingFrame) -> None:
    frame.payload[100] ^= 1
    wire.send(frame)


def double(wire: Wire, frame: OutgoingFrame) -> None:
    wire.add(frame)
    wire.send(frame)


def garble(wire: Wire, frame: OutgoingFrame) -> None:
    for data in GARBAGE[2:]:
        say(frame.destination.address, data)
    wire.send(frame)


def precede(**changes: object) -> Callable[[Wire, OutgoingFrame], None]:
    """The same frame comes under the name of another attempt first."""

    def damage(wire: Wire, frame: OutgoingFrame) -> None:
        attempt = msgspec.structs.replace(frame.header.attempt, **changes)
        wire.add(frame._replace(header=msgspec.structs.replace(frame.header, attempt=attempt)))
        wire.send(frame)

    return damage


def misplace(wire: Wire, frame: OutgoingFrame) -> None:
    piece = msgspec.structs.replace(frame.header.piece, layers=tuple(layer + 1 for layer in frame.header.piece.layers))
    wire.add(frame._replace(header=msgspec.structs.replace(frame.header, piece=piece)))
    wire.send(frame)


DAMAGES: dict[str, tuple[Callable[[Wire, OutgoingFrame], None], set[str], bool]] = {
    "cut": (cut, {"wrong_size", "bad_digest"}, True),
    "flipped": (flip, {"bad_digest"}, True),
    "doubled": (double, {"duplicate_frame"}, True),
    "reordered": (Wire.send_late, {"reordered_frame"}, True),
    "of an earlier attempt": (precede(number=7), {"unknown_attempt"}, True),
    "of another request": (precede(request_id="f" * 32), {"unknown_attempt"}, True),
    "of an earlier life of the receiver": (precede(decode_epoch=5), {"unknown_attempt"}, True),
    "with a flipped header": (precede(number=FLIPPED), {"bad_header"}, False),
    "of another version": (precede(number=OLD), {"bad_version"}, False),
    "in a place that is not the plan's": (misplace, {"wrong_piece"}, False),
    "no frame at all": (garble, {"stranger"}, True),
}
"""What becomes of one frame, the counters of which one must tell, and whether the transfer goes on."""


def damaged_header(header: FrameHeader) -> bytes:
    data = bytearray(encode_header(header))
    if header.attempt.number in (FLIPPED, OLD):
        data[0 if header.attempt.number == OLD else -1] ^= 1
    return bytes(data)


class Scene:
    """One pair of real workers, the wire between them, and what /metrics shows."""

    def __init__(self, cluster: WorkerCluster, wire: Wire) -> None:
        self.cluster = cluster
        self.wire = wire
        self._registry = CollectorRegistry()
        self._registry.register(ClusterMetrics(cluster.controller, "test"))
        (self.answer,) = cluster.generate([PROMPT], GREEDY)

    def counted(self) -> dict[str, float]:
        """Return the decode worker's counters out of the text of /metrics."""
        prefix = 'tandem_worker_total{counter="'
        lines = generate_latest(self._registry).decode().splitlines()
        mine = [line.removeprefix(prefix) for line in lines if line.startswith(prefix) and 'role="decode"' in line]
        return {line.partition('"')[0]: float(line.split()[-1]) for line in mine}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("damage"))


@pytest.fixture(scope="module", params=["zmq", "gloo", "shm"])
def scene(request: pytest.FixtureRequest, model: Path) -> Iterator["Scene"]:
    wires: list[Wire] = []

    def open_wire(name: str, site: Site) -> Wire:
        wires.append(Wire(name, site))
        return wires[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("worker.assembly.open_sender", open_wire)
        patch.setattr(kv_transfer.plan, "SEGMENT_TOKENS", 32)
        for sized in (kv_transfer.plan.frames_of, kv_transfer.plan.manifest_of, KVSender.__init__, KVReceiver.__init__):
            patch.setattr(sized, "__defaults__", (FRAME_BYTES,))
        patch.setattr(connected_peer, "encode_header", damaged_header)
        with WorkerCluster(model, [("prefill", 1, 1), ("decode", 1, 1)], request.param) as cluster:
            yield Scene(cluster, wires[0])


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_frame_has_a_counter_in_metrics_and_no_part_in_any_answer(scene: Scene, damage: str) -> None:
    inflict, names, is_mended = DAMAGES[damage]
    before = scene.counted()
    scene.wire.damage = inflict
    answer = scene.cluster.submit(PROMPT, GREEDY, salt=damage).result(20)
    assert answer.outcome
    assert answer.token_ids == scene.answer or (not is_mended and answer.outcome.code == "transfer_failed")
    scene.cluster.wait_until(lambda: any(scene.counted()[name] > before[name] for name in names), timeout_s=5)
    changed = {name for name, count in scene.counted().items() if count > before[name]}
    assert not is_mended or changed <= names, "nothing else went wrong"
    assert scene.cluster.submit(PROMPT, GREEDY, salt=f"after {damage}").result(20).token_ids == scene.answer
