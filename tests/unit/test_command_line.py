"""What the command line shows: the table of workers, and the way to ready line by line."""

import errno
import io
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from cluster.__main__ import main
from cluster.commands.status import format_table
from cluster.progress import ProgressDisplay
from cluster.ray_session import connected
from cluster.status_client import ClusterStatus, WorkerStatus, fetch_raw, parse_status
from cluster.topology_file import load_topology
from protocol.errors import ConfigError, TandemError
from protocol.messages import BlockCounts, RoleName, WorkerState


def worker(role: RoleName, state: WorkerState, doing: str = "", epoch: str = "a") -> WorkerStatus:
    return WorkerStatus(role=role, group=0, rank=0, pid=1, node="here", state=state, epoch=epoch, doing=doing)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show(progress: ProgressDisplay, *workers: WorkerStatus) -> None:
    progress.show(ClusterStatus(workers))


def test_a_check_says_of_a_broken_chat_template_that_it_costs_chat(tmp_path: Path, capsys):
    for path in Path("configs/demo_model").iterdir():
        (tmp_path / path.name).symlink_to(path.resolve())
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    sets = [word for key in (f"model.path={tmp_path}", "router.port=0") for word in ("--set", key)]
    assert main(["check", "configs/cpu_1p1d.yaml", *sets]) == 0
    fine, complaint = capsys.readouterr().out.splitlines()
    assert ": fine." in fine
    assert "does not compile" in complaint


def test_a_log_gets_one_line_for_every_change_and_none_for_none():
    out = io.StringIO()
    progress = ProgressDisplay(2, out)
    show(progress, worker("prefill", "starting", "weights 3 of 9"))
    show(progress, worker("prefill", "starting", "weights 3 of 9"))
    show(progress, worker("prefill", "ready"), worker("decode", "ready"))
    show(progress, worker("prefill", "dead"), worker("decode", "ready"))
    assert out.getvalue().splitlines() == [
        "prefill 0: weights 3 of 9",
        "workers ready 0 of 2",
        "prefill 0: ready",
        "decode 0: ready",
        "workers ready 2 of 2",
        "prefill 0: lost; Ray starts it again",
        "workers ready 1 of 2",
    ]


def test_a_terminal_shows_the_latest_line_only_until_one_that_stays():
    out = Terminal()
    progress = ProgressDisplay(1, out)
    show(progress, worker("prefill", "ready"))
    progress.say("ready: http://127.0.0.1:8000")
    shown = [line.rpartition("\x1b[2K")[2] for line in out.getvalue().split("\n")]
    assert shown == ["ready: http://127.0.0.1:8000", ""]


class FullDisk(io.StringIO):
    is_full = True

    def flush(self) -> None:
        if self.is_full:
            raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_or_a_reader_that_has_gone_costs_lines_and_nothing_else():
    out = FullDisk()
    progress = ProgressDisplay(2, out)
    show(progress, worker("decode", "ready"))
    out.is_full = False
    show(progress, worker("decode", "dead"))
    assert "decode 0: lost; Ray starts it again" in out.getvalue()


def test_a_groups_kv_cache_is_told_in_tokens_and_in_requests_of_full_length():
    out = io.StringIO()
    leader = msgspec.structs.replace(worker("decode", "ready"), blocks=BlockCounts(total=4096), block_size=16)
    follower = msgspec.structs.replace(leader, rank=1)
    ProgressDisplay(2, out).tell_capacity(ClusterStatus((leader, follower)), max_context=2048)
    assert out.getvalue() == "decode 0: KV cache of 65,536 tokens, 32.0 requests of 2,048\n"


def test_a_table_is_as_wide_as_its_cells():
    assert format_table([("ROLE", "PID"), ("prefill", "7")]) == "ROLE     PID\nprefill  7"


def test_a_status_with_more_than_is_shown_still_reads():
    body = msgspec.json.encode(
        {"workers": [msgspec.to_builtins(worker("decode", "ready")) | {"new": 1}], "requests": 3}
    )
    assert parse_status(body, "http://x").workers == (worker("decode", "ready"),)


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[]", b'{"workers": [{}]}', b'{"workers": [{"role": "\xff"}]}', b'{"a":' * 9999]
)
def test_a_status_of_someone_else_is_refused(body: bytes):
    with pytest.raises(TandemError, match="http://x/status is not a Tandem router's"):
        parse_status(body, "http://x")


def test_a_ray_cluster_that_cannot_be_joined_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_ADDRESS", "nonsense")
    topology, _ = load_topology(Path(__file__).parents[2] / "configs/cpu_1p1d.yaml")
    with pytest.raises(ConfigError, match="RAY_ADDRESS is nonsense, and no Ray cluster"), connected(topology):
        pass


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "http://[::1", ""])
def test_what_is_no_address_of_a_router_is_told_how_to_write_one(url: str):
    with pytest.raises(TandemError, match="write it as http://127.0.0.1:8000"):
        fetch_raw(url)


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH_9.2\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"])
def test_what_speaks_no_http_is_no_router(answer: bytes):
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as threads:

        def serve() -> None:
            with server.accept()[0] as connection:
                connection.recv(1 << 16)
                connection.sendall(answer)

        served = threads.submit(serve)
        with pytest.raises(TandemError, match="no router answers at http://127.0.0.1"):
            fetch_raw(f"http://127.0.0.1:{server.getsockname()[1]}")
        served.result(10)


def test_a_log_level_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_LOG_LEVEL", "verbose")
    command = [sys.executable, "-m", "router"]
    run = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=False)
    assert run.returncode == 2
    assert run.stderr.startswith("router: TANDEM_LOG_LEVEL is VERBOSE; it can be CRITICAL, ")
