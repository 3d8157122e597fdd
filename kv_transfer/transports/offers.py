"""One address that offers several transports: what a receiver of transport "auto" puts into its group's endpoint.

"shm=shm://HOST/NAME zmq=tcp://HOST:PORT", best first. The address of a receiver of one named transport is that
transport's own. Used by automatic.py, and by sending transports to find their part. Pure text; nothing is opened here.
"""

from collections.abc import Mapping


def join_offers(addresses: Mapping[str, str]) -> str:
    """Return one address for several transports, in their order."""
    return " ".join(f"{name}={address}" for name, address in addresses.items())


def offers_in(address: str) -> dict[str, str]:
    """Return the address of each transport that is offered; nothing for the address of a named transport."""
    pairs = (offer.partition("=") for offer in address.split(" "))
    return {name: offered for name, separator, offered in pairs if separator}


def offered(address: str, name: str) -> str:
    """Return this transport's part of an address that may offer several."""
    return offers_in(address).get(name, address)
