"""What all ZMQ sockets here share, against a peer that a plain socket plays."""

import socket
from pathlib import Path

import pytest
import zmq

from protocol.sockets import CONNECT_MS, bind, connect, prepare
from tests.e2e.processes import wait_for

SYN_SENT = "02"


def ports_that_ask(port: int) -> set[str]:
    """Return the local ports from which somebody asks to be let in at this one, and has not been answered."""
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {row[1].split(":")[1] for row in rows if row[3] == SYN_SENT and int(row[2].split(":")[1], 16) == port}


def test_who_is_not_answered_begins_anew_instead_of_asking_after_ever_longer_pauses():
    """A host that is cut off and one that accepts nobody look the same. The system would double its pauses to a minute,
    and so find out that long after the network is back."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, zmq.Context() as context:
        port = full.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)), prepare(context.socket(zmq.DEALER)) as dealer:
            dealer.connect(f"tcp://127.0.0.1:{port}")
            first = wait_for(lambda: ports_that_ask(port), 10, "it asks to be let in")
            wait_for(lambda: ports_that_ask(port) - first, 5 * CONNECT_MS / 1000, "it begins anew")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_what_is_bound_can_be_connected_to_over_either_family(host: str):
    if not has_address(host):
        pytest.skip(f"this machine has no {host}")
    with (
        zmq.Context() as context,
        prepare(context.socket(zmq.PULL)) as puller,
        prepare(context.socket(zmq.PUSH)) as pusher,
    ):
        address = bind(puller, host)
        connect(pusher, address)
        pusher.send(b"here")
        assert puller.poll(10_000)


def has_address(host: str) -> bool:
    try:
        socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError:
        return False
    return True
