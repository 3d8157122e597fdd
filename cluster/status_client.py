"""The router's GET /status, as the command line reads it.

Only the keys that are shown or waited for are named here; whatever else the router tells is passed over.
"""

import http.client
import urllib.error
import urllib.request
from urllib.parse import urlsplit

import msgspec

from protocol.errors import UNPARSABLE, TandemError
from protocol.messages import BlockCounts, RoleName, WorkerState

_TIMEOUT_S = 5.0


class WorkerStatus(msgspec.Struct, frozen=True):
    """One rank of one group, as the router sees it. The numbers are those of its group's leader."""

    role: RoleName
    group: int
    rank: int
    pid: int
    node: str
    state: WorkerState
    epoch: str
    doing: str = ""
    blocks: BlockCounts = BlockCounts()
    block_size: int = 0
    running: int = 0
    waiting: int = 0
    transports: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.role} {self.group}" + (f" rank {self.rank}" if self.rank else "")


class ClusterStatus(msgspec.Struct, frozen=True):
    """All workers that have joined."""

    workers: tuple[WorkerStatus, ...] = ()


_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the router is ours: no proxy lies between


def fetch_raw(router_url: str) -> bytes:
    """Return the body of GET router_url/status. Raise TandemError when nothing of ours answers there."""
    if not _is_http(router_url):
        raise TandemError(f"{router_url} is not the address of a router; write it as http://127.0.0.1:8000")
    try:
        with _opener.open(f"{router_url.rstrip('/')}/status", timeout=_TIMEOUT_S) as answer:
            return bytes(answer.read())
    except urllib.error.HTTPError as error:
        raise TandemError(f"{router_url} answered {error.code} to GET /status: is it a Tandem router?") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise TandemError(
            f"no router answers at {router_url} ({reason}); start one, or name it with --router"
        ) from None


def _is_http(url: str) -> bool:
    try:
        return urlsplit(url).scheme in ("http", "https")
    except ValueError:  # a bracket that does not close
        return False


def fetch_status(router_url: str) -> ClusterStatus:
    """Return the parsed status. Raise TandemError when nothing of ours answers there."""
    return parse_status(fetch_raw(router_url), router_url)


def parse_status(body: bytes, router_url: str) -> ClusterStatus:
    """Return the status in body, or raise TandemError naming what does not fit."""
    try:
        return msgspec.json.decode(body, type=ClusterStatus)
    except UNPARSABLE as error:
        raise TandemError(f"{router_url}/status is not a Tandem router's: {error}") from None
