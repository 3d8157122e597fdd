"""The greeting of two ranks that meet for the first time: who is a sender of this cluster, and may it send here.

Used by all transports when they open a connection. Three messages, the receiver's first:

    challenge   MAGIC, version, the receiver's nonce
    hello       MAGIC, version, the sender's nonce, its proof, and a Hello as MessagePack
    verdict     the receiver's proof, and why the sender is refused, or nothing

A proof is HMAC-SHA256, with the cluster's secret, over both nonces and what its message says, so that it can be made by
members of the cluster only and is good for one connection only. What is sent afterwards is neither signed nor secret:
this keeps strangers out, not somebody who can change packets on the way. Both leaders have compared layouts before;
here the two ranks themselves do, so that no mistake in between can let frames of one layout into a cache of another.
"""

import hmac
import secrets

import msgspec

from kv_transfer.frames import FRAME_VERSION
from kv_transfer.plan import plan_transfer
from protocol.errors import UNPARSABLE, TandemError, WireError
from protocol.identity import Epoch
from protocol.layout import KVLayout

MAGIC = b"tandem-kv"
MAX_HELLO_BYTES = 4096
"""Of any message of a greeting; nothing more is kept of whom nobody knows yet."""

_NONCE_BYTES = _PROOF_BYTES = 32
_OPENING = MAGIC + bytes([FRAME_VERSION])


class RefusedError(TandemError):
    """One end has said, or found, that these two do not belong together. To ask again would change nothing."""


class StrangerError(WireError):
    """Whoever connected has not proven to be of this cluster."""


class Hello(msgspec.Struct, frozen=True, array_like=True):
    """What a sending rank says of itself. extra: what its transport has to say besides."""

    layout: KVLayout
    epoch: Epoch
    rank: int
    extra: bytes = b""


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Hello)


class Caller:
    """The sender's side of one greeting."""

    def __init__(self, secret: bytes, hello: Hello) -> None:
        self._secret = secret
        self._body = _encoder.encode(hello)
        self._nonce = secrets.token_bytes(_NONCE_BYTES)
        self._theirs = b""

    def hello(self, challenge: bytes) -> bytes:
        """Return the answer to a challenge. Raises RefusedError for what is none.

        A challenge of another version is answered as well: it is the receiver who says that versions differ.
        """
        if not challenge.startswith(MAGIC) or len(challenge) != len(_OPENING) + _NONCE_BYTES:
            raise RefusedError("whoever listens there is no receiver of KV")
        self._theirs = challenge[len(_OPENING) :]
        proof = _proof(self._secret, b"sender", self._theirs, self._nonce, self._body)
        return _OPENING + self._nonce + proof + self._body

    def take_verdict(self, message: bytes) -> None:
        """Return if the receiver is of this cluster and welcomes us. Raises RefusedError, which says why, if not."""
        proof, reason = message[:_PROOF_BYTES], message[_PROOF_BYTES:]
        if not hmac.compare_digest(proof, _proof(self._secret, b"receiver", self._nonce, self._theirs, reason)):
            raise RefusedError("sender and receiver do not have the same cluster's secret")
        if reason:
            raise RefusedError(reason.decode(errors="replace"))


class Doorkeeper:
    """The receiver's side of one greeting."""

    def __init__(self, secret: bytes, layout: KVLayout) -> None:
        self._secret = secret
        self._layout = layout
        self._nonce = secrets.token_bytes(_NONCE_BYTES)
        self._theirs = b""

    @property
    def challenge(self) -> bytes:
        return _OPENING + self._nonce

    def judge(self, message: bytes) -> tuple[Hello | None, str]:
        """Return what a hello says, and why its sender may not send, "" when it may; None of another version's.

        Raises StrangerError for anything that does not prove that a member of this cluster has made it.
        """
        if not message.startswith(MAGIC) or len(message) <= len(_OPENING) + _NONCE_BYTES + _PROOF_BYTES:
            raise StrangerError("a connection that does not begin with a hello")
        version, rest = message[len(MAGIC)], message[len(_OPENING) :]
        self._theirs = rest[:_NONCE_BYTES]
        if version != FRAME_VERSION:
            return None, f"version of KV transfer differs: sender {version}, receiver {FRAME_VERSION}"
        proof, body = rest[_NONCE_BYTES : _NONCE_BYTES + _PROOF_BYTES], rest[_NONCE_BYTES + _PROOF_BYTES :]
        if not hmac.compare_digest(proof, _proof(self._secret, b"sender", self._nonce, self._theirs, body)):
            raise StrangerError("a hello whose proof is not made with this cluster's secret")
        try:
            hello = _decoder.decode(body)
        except UNPARSABLE as error:
            return None, f"a hello that does not parse: {error}"
        return hello, _misfit(hello.layout, self._layout)

    def verdict(self, refusal: str) -> bytes:
        """Return the message that says so."""
        reason = refusal.encode()[: MAX_HELLO_BYTES - _PROOF_BYTES]
        return _proof(self._secret, b"receiver", self._theirs, self._nonce, reason) + reason


def _misfit(theirs: KVLayout, ours: KVLayout) -> str:
    try:
        plan_transfer(theirs, ours)
    except ValueError as error:
        return str(error)
    return ""


def _proof(secret: bytes, side: bytes, first: bytes, second: bytes, said: bytes) -> bytes:
    """Nonces have one length each and sides differ, so no two different sayings are the same bytes."""
    return hmac.digest(secret, side + _OPENING + first + second + said, "sha256")
