"""A model that is fetched from a hub: the real client against a small hub of our own on a real socket."""

import hashlib
import json
import threading
from collections.abc import Iterator
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from models import hub
from models.files import TOKENIZER_FILES, find_model
from models.fingerprint import StampedFiles
from protocol.errors import ConfigError

COMMIT = "a" * 40
MODEL = "somebody/a-model"


class Hub(ThreadingHTTPServer):
    """Gives the files of one model. The second half of a file in `held` comes when it is let go."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files = files
        self.held: dict[str, threading.Event] = {}
        self.given: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        path, files = self.path.partition("?")[0], self.server.files
        name = path.rpartition("/")[2]
        if path == f"/api/models/{MODEL}/revision/main":
            self._say(json.dumps({"id": MODEL, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]}))
        elif path == f"/api/models/{MODEL}/tree/{COMMIT}":
            entries = [{"type": "file", "path": f, "size": len(b), "oid": _digest(b)} for f, b in files.items()]
            self._say(json.dumps(entries))
        elif path == f"/{MODEL}/resolve/{COMMIT}/{name}" and name in files:
            self._give(name, files[name])
        else:
            self.send_error(404)

    def do_HEAD(self) -> None:
        self.do_GET()

    def _say(self, text: str) -> None:
        self._head(len(text), "none")
        if self.command != "HEAD":
            self.wfile.write(text.encode())

    def _give(self, name: str, content: bytes) -> None:
        self._head(len(content), _digest(content))
        if self.command == "HEAD":
            return
        self.server.given.append(name)
        half = len(content) // 2
        self.wfile.write(content[:half])
        self.wfile.flush()
        if name in self.server.held:
            self.server.held[name].wait(30)
        self.wfile.write(content[half:])

    def _head(self, size: int, tag: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(size))
        self.send_header("ETag", f'"{tag}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Tests are quiet."""


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def own_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    files = {
        "config.json": b'{"hidden_size": 64}',
        "tokenizer.json": b"{}",
        "model.safetensors": bytes(range(250)) * 100_000,
        "model.bin": b"in another format",
    }
    with Hub(files) as own:
        threading.Thread(target=own.serve_forever, daemon=True).start()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", own.url)
        pages = f"{own.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", pages)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        yield own
        own.shutdown()


def test_a_model_comes_whole_without_what_is_not_needed_and_only_once(own_hub: Hub) -> None:
    folder = find_model(MODEL)
    assert {file.name for file in folder.iterdir()} == {"config.json", "tokenizer.json", "model.safetensors"}
    assert all((folder / name).read_bytes() == own_hub.files[name] for name in own_hub.given)
    StampedFiles(folder).fingerprint()
    assert find_model(MODEL) == folder
    assert len(own_hub.given) == 3


def test_the_router_fetches_no_weights(own_hub: Hub) -> None:
    folder = find_model(MODEL, TOKENIZER_FILES)
    names = {file.name for file in folder.iterdir()}
    assert names == {"config.json", "tokenizer.json"}
    assert all(any(fnmatch(name, pattern) for pattern in TOKENIZER_FILES) for name in names)


def test_a_long_fetch_says_how_much_has_come(own_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "TELL_EVERY_S", 0.05)
    half_way = own_hub.held["model.safetensors"] = threading.Event()
    told: list[str] = []

    def listen(doing: str) -> None:
        told.append(doing)
        if not doing.endswith(": 0 MB"):
            half_way.set()

    folder = find_model(MODEL, progress=listen)
    assert f"fetching {MODEL} from the hub: 10 MB" in told, "the client reads 10 MB at a time"
    assert (folder / "model.safetensors").read_bytes() == own_hub.files["model.safetensors"]


def test_what_the_hub_does_not_have_is_named(own_hub: Hub) -> None:
    with pytest.raises(ConfigError, match=r"model\.path somebody/else is neither a folder nor a model the hub gave us"):
        find_model("somebody/else")
