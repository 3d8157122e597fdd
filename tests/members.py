"""The secret of the clusters under test, and a socket of one who has it."""

import zmq

from protocol.secret import Purpose, new_secret
from protocol.sockets import prepare_for_members

SECRET = new_secret()


def member(context: "zmq.Context[zmq.Socket[bytes]]", kind: int, purpose: Purpose = "control") -> "zmq.Socket[bytes]":
    """Return a socket of this kind for this door of the cluster: a ROUTER's own, or any other's to connect to it."""
    return prepare_for_members(context.socket(kind), SECRET.key(purpose))
