"""Checkpoints by hub id, against a stand-in that answers as the hub does."""

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from halfbyte.checkpoint.hub import choose_files, locate
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.errors import CapacityError, CheckpointError, UnsupportedError, UsageError
from halfbyte.hub import refuse
from halfbyte.model.tiny import write_tiny_checkpoint

NAME = "owner/tiny-model"
OLD, NEW = "0123456789abcdef" * 2 + "01234567", "fedcba9876543210" * 2 + "fedcba98"


class _Handler(BaseHTTPRequestHandler):
    """Model info, commits and files, from a folder per commit; `main` is the newest."""

    folder: Path
    asked: list[str]

    def log_message(self, format: str, *args: object) -> None:
        self.asked.append(format % args)

    def _send(self, status: int, data: bytes, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), Content_Type="application/json")

    def _info(self, commit: str) -> None:
        files = sorted(path for path in (self.folder / commit).iterdir())
        siblings = [{"rfilename": p.name, "size": p.stat().st_size, "blobId": "0" * 40}
                    for p in files]  # fmt: skip
        self._json({"id": NAME, "sha": commit, "private": False, "siblings": siblings})

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        api = f"/api/models/{NAME}"
        if path == api:
            self._info(NEW)
        elif path.startswith(f"{api}/revision/"):
            revision = path.rpartition("/")[2]
            self._info(NEW if revision == "main" else revision)
        elif path.startswith(f"{api}/tree/"):
            files = sorted((self.folder / path.rpartition("/")[2]).iterdir())
            self._json(
                [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": "0" * 40}
                 for p in files]
            )  # fmt: skip
        elif path.startswith(f"{api}/commits/"):
            made = "2026-01-01T00:00:00.000Z"
            self._json(
                [{"id": sha, "title": "t", "message": "", "date": made, "authors": []}
                 for sha in (NEW, OLD)]
            )  # fmt: skip
        elif path.startswith(f"/{NAME}/resolve/"):
            commit, _, name = path.removeprefix(f"/{NAME}/resolve/").partition("/")
            data = (self.folder / commit / name).read_bytes()
            self._send(
                200, data, ETag=f'"{hashlib.sha256(data).hexdigest()}"', X_Repo_Commit=commit
            )
        else:
            self._json({"error": "Repository not found"}, 404)

    do_HEAD = do_GET


@dataclass
class Hub:
    """A stand-in: `commit` fills a revision, `get` fetches."""

    address: str
    folder: Path
    cache: Path
    asked: list[str] = field(default_factory=list)

    def get(self, source: str) -> Any:
        return locate(source, allow_hub=True, cache=self.cache, endpoint=self.address)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    pytest.importorskip("huggingface_hub", reason="fetching needs huggingface_hub")
    folder = tmp_path / "commits"
    for seed, commit in enumerate((OLD, NEW)):
        write_tiny_checkpoint(folder / commit, layers=2, seed=seed, dialect="mistral-fp8")
        (folder / commit / "tokenizer.json").write_text("{}")
        (folder / commit / "params.json").write_text("{}")
        (folder / commit / "consolidated-00001-of-00001.safetensors").write_bytes(b"twice")
        (folder / commit / "picture.png").write_bytes(b"picture")
    asked: list[str] = []
    handler = type("Handler", (_Handler,), {"folder": folder, "asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield Hub(f"http://127.0.0.1:{server.server_port}", folder, tmp_path / "cache", asked)
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("revision", [OLD, OLD[:8]])
def test_the_pinned_commit_is_what_opens(hub: Hub, revision: str) -> None:
    found = hub.get(f"{NAME}@{revision}")
    assert found.origin == f"{NAME}@{OLD}"
    stored = Checkpoint.open(found.directory)
    wanted = Checkpoint.open(hub.folder / OLD)
    assert stored.tensor("decoder.0.mlp.up.weight").equal(wanted.tensor("decoder.0.mlp.up.weight"))
    names = {path.name for path in found.directory.iterdir()}
    assert names >= {"config.json", "tokenizer.json", "model.safetensors"}
    assert not names & {"consolidated-00001-of-00001.safetensors", "picture.png"}
    assert not any(f"resolve/{NEW}" in line for line in hub.asked)


def test_without_a_revision_the_newest_is_taken_and_named(hub: Hub) -> None:
    assert hub.get(NAME).origin == f"{NAME}@{NEW}"


def test_what_is_in_the_cache_is_not_fetched_again_nor_needed_online(hub: Hub) -> None:
    first = hub.get(f"{NAME}@{OLD}")
    hub.asked.clear()
    assert hub.get(f"{NAME}@{OLD}") == first
    assert not any("GET" in line and "safetensors" in line for line in hub.asked)
    offline = locate(
        f"{NAME}@{OLD}", allow_hub=True, cache=hub.cache, endpoint="http://127.0.0.1:9"
    )
    assert offline == first


def test_what_cannot_be_had_is_said_with_a_way_out(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnsupportedError, match="local copy"):
        hub.get("owner/other")
    with pytest.raises(UsageError, match="no commit begins with beefbeef"):
        hub.get(f"{NAME}@beefbeef")
    with pytest.raises(UsageError, match="--hub fetches it"):
        locate(NAME, allow_hub=False)
    with pytest.raises(CheckpointError, match="no such directory"):
        locate(str(tmp_path / "absent"), allow_hub=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(CapacityError, match="HF_HOME"):
        hub.get(f"{NAME}@{OLD}")


def test_a_directory_comes_before_an_id_of_the_same_name(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / NAME).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.get(NAME).directory == Path(NAME)
    assert hub.asked == []


def test_native_weights_are_fetched_only_where_there_are_no_others() -> None:
    native = ["consolidated.safetensors", "params.json", "tekken.json", "README.md", "x/y.json"]
    assert choose_files(native, "m") == ["consolidated.safetensors", "params.json", "tekken.json"]
    both = [*native, "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    assert "consolidated.safetensors" not in choose_files(both, "m")
    with pytest.raises(CheckpointError, match="holds no"):
        choose_files(["pytorch_model.bin"], "m")


@pytest.mark.parametrize(
    "error, said",
    [(OSError("first line\nsecond line"), "from the hub: first line. Some"),
     (OSError("only line"), "from the hub: only line. Some"),
     (TimeoutError(), "from the hub: TimeoutError. Some")],
)  # fmt: skip
def test_the_first_line_of_a_failure_is_shown(error: Exception, said: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        refuse("owner/name cannot be fetched from the hub", "Some models need a login", error)
    assert said in str(caught.value) and "second" not in str(caught.value)
