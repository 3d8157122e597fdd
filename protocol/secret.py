"""The cluster's secret: 32 random bytes that make a process a member. What each door asks for is derived from it.

`up` draws one for each cluster and hands it on in RouterLaunch and WorkerLaunch, never in arguments, environments, logs
or pages. A router that is started by hand has its user's own, a file that nobody else may read. How doors ask is not
known here: see protocol/sockets.py and kv_transfer.
"""

import hmac
import os
import secrets
import stat
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from protocol.errors import ConfigError

SECRET_BYTES = 32

Purpose = Literal["control", "orders", "kv"]
"""A door of the cluster: the router's, a group leader's, a KV receiver's."""


class Secret(msgspec.Struct, frozen=True):
    """Compare it, send it in a launch, derive keys of it; printing it shows nothing."""

    value: Annotated[bytes, msgspec.Meta(min_length=SECRET_BYTES, max_length=SECRET_BYTES)]

    def key(self, purpose: Purpose) -> bytes:
        """Return the 32 bytes that open this door, from which neither the secret nor another key can be computed."""
        return hmac.digest(self.value, b"tandem " + purpose.encode(), "sha256")

    def __repr__(self) -> str:
        return "Secret(...)"

    def __rich_repr__(self) -> list[tuple[str, object]]:
        return []  # what prints prettily asks here for the fields


def new_secret() -> Secret:
    """Draw the secret of a new cluster."""
    return Secret(secrets.token_bytes(SECRET_BYTES))


def own_secret() -> Secret:
    """Return the secret that all programs of this user share on this machine, drawn at its first use.

    Raise ConfigError when its file cannot be had, or when others could have read or written it.
    """
    path = _state_folder() / "secret"
    try:
        if not path.exists():
            _draw(path)
        return Secret(_read(path))
    except OSError as error:
        raise ConfigError(f"{path} cannot be used: {error.strerror}; XDG_STATE_HOME can name another folder") from None


def _state_folder() -> Path:
    """Return where programs of this user keep what lasts; a relative XDG_STATE_HOME is to be ignored."""
    named = Path(os.environ.get("XDG_STATE_HOME", ""))
    return (named if named.is_absolute() else Path.home() / ".local" / "state") / "tandem"


def _draw(path: Path) -> None:
    """Make the file, whole from its first moment: of several that draw at once, one wins and all read the same."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f"secret-{secrets.token_hex(8)}")
    draft.touch(mode=0o600, exist_ok=False)
    try:
        draft.write_bytes(new_secret().value)
        path.hardlink_to(draft)
    except FileExistsError:
        pass
    finally:
        draft.unlink()


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        value = file.read(SECRET_BYTES + 1)
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise ConfigError(f"{path} must be yours, and yours alone to read (chmod 600); delete it to have a new one")
    if len(value) != SECRET_BYTES:
        raise ConfigError(f"{path} must hold {SECRET_BYTES} bytes; delete it to have a new one")
    return value
