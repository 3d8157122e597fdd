"""The GET endpoints: models, health, readiness, the cluster's state, metrics."""

from typing import Any, get_args

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.core import Metric
from starlette.requests import Request
from starlette.responses import Response

from protocol.messages import BlockCounts
from protocol.topology import Transport
from router.control.membership import Group, Member
from router.front.errors import no_such_model, unavailable
from router.front.responses import ModelCard, ModelList
from router.front.serving import Serving

_TRANSPORTS = get_args(Transport)


class RankStatus(msgspec.Struct, frozen=True):
    """One rank as /status shows it. epoch is in hex, because JSON readers round large numbers.

    block_size: tokens in each of blocks, 0 before the group is ready. transports: over which ones its group has sent KV
    so far, on a prefill leader.
    """

    role: str
    group: int
    rank: int
    pid: int
    node: str
    state: str
    epoch: str
    blocks: BlockCounts
    block_size: int
    running: int
    waiting: int
    doing: str
    transports: list[str]


class Status(msgspec.Struct, frozen=True):
    """Answer of /status. requests counts those that still hold something somewhere."""

    workers: list[RankStatus]
    requests: int


class Health(msgspec.Struct, frozen=True):
    status: str


def json(content: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")


async def models(http: Request) -> Response:
    serving = _serving(http)
    return json(ModelList([ModelCard(serving.model_name, serving.created, serving.max_context)]))


async def model(http: Request) -> Response:
    serving = _serving(http)
    name = http.path_params["name"]
    if name != serving.model_name:
        raise no_such_model(name, serving.model_name)
    return json(ModelCard(serving.model_name, serving.created, serving.max_context))


async def health(http: Request) -> Response:
    """The process answers; says nothing of the workers."""
    return json(Health("ok"))


async def ready(http: Request) -> Response:
    """200 while answers get through every group: a client's, or a canary's where none is served."""
    reason = _serving(http).why_not_ready
    if reason is not None:
        raise unavailable(reason, "not_ready")
    return json(Health("ready"))


async def status(http: Request) -> Response:
    """Every rank that was seen, the lost ones until their next life has joined."""
    controller = _serving(http).control.controller
    groups = sorted(controller.membership.groups.items())
    ranks = [_rank_status(group, rank) for _, group in groups for _, rank in sorted(group.ranks.items())]
    return json(Status(ranks, len(controller.attempts)))


async def metrics(http: Request) -> Response:
    """Read where it changes, and written by a thread: the text of a thousand groups takes a tenth of a second."""
    collected = _Collected(list(http.app.state.registry.collect()))
    text = await _serving(http).metrics_writing.run(generate_latest, collected)
    return Response(text, media_type=CONTENT_TYPE_LATEST)


class _Collected:
    """What a registry held at one moment."""

    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> list[Metric]:
        return self._metrics


def _serving(http: Request) -> Serving:
    serving: Serving = http.app.state.serving
    return serving


def _rank_status(group: Group, rank: Member) -> RankStatus:
    info, load = rank.info, rank.load
    return RankStatus(
        info.role,
        info.group,
        info.rank,
        info.pid,
        info.node,
        rank.state,
        f"{info.epoch:x}",
        load.blocks,
        group.ready.endpoint.layout.block_size if group.ready else 0,
        load.running,
        load.waiting,
        rank.doing,
        [name for name in _TRANSPORTS if load.counters.get(f"connections_{name}")],
    )
