"""The cluster's secret: what comes of it, that no print shows it, and the file of a user's own."""

import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

import msgspec
import pytest

from protocol.errors import ConfigError
from protocol.secret import SECRET_BYTES, Purpose, Secret, new_secret, own_secret
from protocol.topology import KVTransferSection, PrefillSection, RouterSection
from router.launch import GroupSpec, RouterLaunch
from worker import launch
from worker.launch import CacheLaunch, ModelLaunch, WorkerLaunch

SECRET = Secret(b"0123456789abcdefghijklmnopqrstuv")
SHOWN = ("0123", SECRET.value.hex()[:8], "MDEy")  # as it is, in hex, in base 64
ROUTER = RouterLaunch(
    section=RouterSection(),
    control_host="127.0.0.1",
    model_folder="/",
    model_name="m",
    max_context=16,
    vocab_size=16,
    groups=(GroupSpec("prefill", 0), GroupSpec("decode", 0)),
    secret=SECRET,
)
WORKER = WorkerLaunch(
    role="prefill",
    group=0,
    rank=0,
    model=ModelLaunch("m", "float32", 64),
    role_section=PrefillSection(),
    kv_cache=CacheLaunch(1 << 20, 0.0, 16, True),
    kv_transfer=KVTransferSection(),
    device="cpu",
    control="tcp://127.0.0.1:1",
    secret=SECRET,
)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return where the user's own secret will be."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "tandem" / "secret"


def test_launches_carry_the_secret_and_do_not_show_it() -> None:
    assert msgspec.json.decode(msgspec.json.encode(ROUTER), type=RouterLaunch) == ROUTER
    assert launch.decode(launch.encode(WORKER)) == WORKER
    for carrier in (SECRET, ROUTER, WORKER):
        for text in (repr(carrier), str(carrier), f"{carrier}", str(carrier.__rich_repr__())):
            assert not any(shown in text for shown in SHOWN)


def test_a_secret_of_another_length_is_refused_without_being_shown() -> None:
    short = msgspec.json.encode(msgspec.structs.replace(ROUTER, secret=Secret(SECRET.value[:20])))
    with pytest.raises(msgspec.ValidationError) as error:
        msgspec.json.decode(short, type=RouterLaunch)
    assert not any(shown in str(error.value) for shown in SHOWN)


def test_every_door_of_every_cluster_has_a_key_of_its_own() -> None:
    keys = {secret.key(purpose) for secret in (SECRET, new_secret()) for purpose in get_args(Purpose)}
    assert len(keys) == 2 * len(get_args(Purpose))
    assert {len(key) for key in keys} == {32}
    assert SECRET.key("control") == Secret(SECRET.value).key("control")


def test_programs_of_one_user_that_start_at_once_share_a_secret_that_nobody_else_may_read(file: Path) -> None:
    at_once = threading.Barrier(8)
    with ThreadPoolExecutor(8) as threads:
        drawn = list(threads.map(lambda _: (at_once.wait(), own_secret())[1], range(8)))
    assert {secret.value for secret in drawn} == {file.read_bytes()}
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_secret_that_others_may_read_or_write_is_not_used(file: Path, mode: int) -> None:
    own_secret()
    file.chmod(mode)
    with pytest.raises(ConfigError, match="chmod 600"):
        own_secret()


@pytest.mark.parametrize("length", [0, SECRET_BYTES - 1, SECRET_BYTES + 1])
def test_a_file_that_holds_no_secret_is_not_used(file: Path, length: int) -> None:
    own_secret()
    file.write_bytes(bytes(length))
    with pytest.raises(ConfigError, match="delete it"):
        own_secret()


def test_a_folder_that_cannot_be_had_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="XDG_STATE_HOME can name another"):
        own_secret()
