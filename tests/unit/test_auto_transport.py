"""Which transport "auto" takes, for every pair of devices and places; senders and receivers are not opened here."""

import pytest
import torch

from kv_transfer.transports import opening
from kv_transfer.transports.automatic import best_of
from kv_transfer.transports.opening import automatic_names
from kv_transfer.transports.slab.reach import Reach
from kv_transfer.transports.transport import Site
from protocol.layout import KVLayout, keys_and_values

LAYOUT = KVLayout("model", 1, keys_and_values(1, 8, "float32"), 16, 1)
GPUS = {"cuda:0": "GPU-a", "cuda:1": "GPU-b", "cuda:2": "GPU-far"}
"""The first two read one another's memory."""


def site_on(device: str) -> Site:
    return Site("127.0.0.1", torch.device(device), LAYOUT, 1.0, b"")


def reaches_of(host: str, device: str) -> dict:
    reachable = ["GPU-a", "GPU-b"] if GPUS.get(device) in ("GPU-a", "GPU-b") else [GPUS.get(device)]
    return {
        "shm": Reach("shm", host, frozenset([host])).reaches,
        "cuda_ipc": Reach("cuda_ipc", f"{host}/x", frozenset(f"{host}/{gpu}" for gpu in reachable)).reaches,
    }


def offers_of(host: str, device: str) -> dict[str, str]:
    addresses = {
        "cuda_ipc": f"cuda_ipc://{host}/{GPUS.get(device)}/name",
        "nccl": "tcp://10.0.0.1:1",
        "shm": f"shm://{host}/name",
        "zmq": "tcp://10.0.0.1:2",
    }
    return {name: addresses[name] for name in automatic_names(site_on(device))}


@pytest.mark.parametrize(
    ("sender", "receiver", "best"),
    [
        (("a", "cuda:0"), ("a", "cuda:0"), "cuda_ipc"),
        (("a", "cuda:0"), ("a", "cuda:1"), "cuda_ipc"),
        (("a", "cuda:0"), ("a", "cuda:2"), "nccl"),
        (("a", "cuda:0"), ("b", "cuda:0"), "nccl"),
        (("a", "cuda:0"), ("a", "cpu"), "shm"),
        (("a", "cpu"), ("a", "cuda:0"), "shm"),
        (("a", "cuda:0"), ("b", "cpu"), "zmq"),
        (("a", "cpu"), ("a", "cpu"), "shm"),
        (("a", "cpu"), ("b", "cpu"), "zmq"),
    ],
    ids=str,
)
def test_the_best_that_both_ends_can_do_is_taken(sender, receiver, best):
    assert best_of(automatic_names(site_on(sender[1])), offers_of(*receiver), reaches_of(*sender)) == best


def test_a_receiver_of_one_named_transport_is_reached_over_tcp():
    assert best_of(automatic_names(site_on("cpu")), {}, reaches_of("a", "cpu")) == "zmq"


def test_without_a_host_identity_nothing_that_shares_memory_is_offered(monkeypatch):
    monkeypatch.setattr(opening, "host_identity", lambda: "")
    assert automatic_names(site_on("cpu")) == ("zmq",)
    assert automatic_names(site_on("cuda:0")) == ("nccl", "zmq")


@pytest.mark.parametrize("address", ["", "shm://", "shm:///name", "shm://b/name", "cuda_ipc://a/name", "tcp://a:1"])
def test_an_address_of_elsewhere_or_of_something_else_is_refused(address):
    reach = Reach("shm", "a", frozenset(["a"]))
    assert not reach.reaches(address)
    with pytest.raises(ValueError, match="shm"):
        reach.name_at(address)
