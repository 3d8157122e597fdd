"""Who is speaking about what: epochs of processes and attempts of requests.

Every control message and every KV frame carries an Attempt, so that nothing meant for a process that died, or for an
earlier try of a request, can ever be taken for something current. Used by every part; knows nothing of sockets.
"""

import secrets

import msgspec

Epoch = int
"""One life of one process: random bits drawn when it starts (63, so that it fits every signed integer)."""


def new_epoch() -> Epoch:
    """Draw the identity of this life of the process; zero is never drawn and means "nobody"."""
    return secrets.randbits(62) + 1


def new_request_id() -> str:
    """Return 128 random bits in hex. Clients never choose it: their own ids are labels only."""
    return secrets.token_hex(16)


class Attempt(msgspec.Struct, frozen=True, array_like=True):
    """One try of one request on one pair of groups. Made by the router alone.

    The epochs are those of the two groups' leaders; a colocated group has the same on both sides.
    """

    request_id: str
    number: int
    prefill_epoch: Epoch
    decode_epoch: Epoch
    transfer_id: int

    def __str__(self) -> str:
        return f"{self.request_id}#{self.number}"

    @property
    def epochs(self) -> tuple[Epoch, Epoch]:
        """Prefill's and decode's."""
        return self.prefill_epoch, self.decode_epoch

    def epoch_opposite(self, epoch: Epoch) -> Epoch:
        """Return the epoch of the attempt's other group, where KV comes from: it may go either way."""
        return self.decode_epoch if epoch == self.prefill_epoch else self.prefill_epoch


def new_attempt(request_id: str, number: int, prefill_epoch: Epoch, decode_epoch: Epoch) -> Attempt:
    """Return a fresh attempt with a transfer id that no other attempt shares."""
    return Attempt(request_id, number, prefill_epoch, decode_epoch, new_epoch())
