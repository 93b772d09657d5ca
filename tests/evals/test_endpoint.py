"""Which server is asked and what it serves; one that is started beside a run may not outlive us."""

import hashlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from halfbyte.checkpoint.identity import checkpoint_identity
from halfbyte.errors import UnsupportedError, UsageError
from halfbyte.evals.running.endpoint import (
    Endpoint,
    base_address,
    connect,
    describe_checkpoint,
    describe_served,
    is_here,
    read_key,
    serve,
)
from halfbyte.model.tiny import write_tiny_checkpoint

PARENT = """
import subprocess, sys
from halfbyte.child import ending_with_us
child = subprocess.Popen(ending_with_us([sys.executable, "-c", "import time; time.sleep(100)"]))
print(child.pid, flush=True)
child.wait()
"""


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def arguments(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:3]


@pytest.mark.skipif(sys.platform != "linux", reason="parent death signals are Linux's")
def test_a_server_ends_with_a_run_that_is_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    # The child has asked for the signal once its own program runs; between two it shows nothing.
    deadline = time.monotonic() + 10
    while "import time; time.sleep(100)" not in arguments(child):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert is_running(child)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    while is_running(child):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_run_knows_the_checkpoint_behind_its_address(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        write_tiny_checkpoint(tmp_path / name, layers=1, seed=seed)
    own = checkpoint_identity(tmp_path / "a")
    ours = Endpoint("http://x/v1", "m", None, {"health": {"checkpoint": own}})
    assert describe_served(ours, None) == {"identity": own}
    assert describe_served(ours, tmp_path / "a") == describe_checkpoint(tmp_path / "a")
    with pytest.raises(UsageError, match="but http://x/v1 serves"):
        describe_served(ours, tmp_path / "b")
    odd: tuple[Any, ...] = (None, [], {}, {"checkpoint": 3})
    for health in odd:
        silent = Endpoint("http://x/v1", "m", None, {"health": health})
        assert describe_served(silent, None) == {}
        assert describe_served(silent, tmp_path / "b")["identity"] != own


@pytest.mark.parametrize(
    "given, address",
    [
        ("host:8000", "http://host:8000/v1"),
        (" https://a ", "https://a/v1"),
        ("https://a/openai/v1/chat/completions", "https://a/openai/v1"),
        ("https://a/v1beta/openai/", "https://a/v1beta/openai"),
        ("http://a/v1/models?x=1#y", "http://a/v1"),
        ("http://a/v1/completions", "http://a/v1"),
        ("http://[::1]:80", "http://[::1]/v1"),
    ],
)
def test_an_address_is_the_one_that_was_meant(given: str, address: str) -> None:
    assert base_address(given) == address


@pytest.mark.parametrize("given", ["ftp://host/v1", "file:///etc", "http://", "https:///v1", "://"])
def test_what_is_no_http_address_is_refused(given: str) -> None:
    with pytest.raises(UsageError, match="not the address of a server"):
        base_address(given)


class Listing(BaseHTTPRequestHandler):
    """A server that lists the models it is given."""

    models: ClassVar[Any] = []
    context: ClassVar[dict[str, int]] = {}
    keys: ClassVar[list[str | None]] = []
    status: ClassVar[int] = 200

    def do_GET(self) -> None:
        self.keys.append(self.headers["Authorization"])
        if self.path == "/v1/models":
            body: dict[str, Any] = {"data": [{"id": name, **self.context} for name in self.models]}
        elif self.path == "/health":
            body = {"status": "ok"}
        else:
            self.send_error(404)
            return
        content = json.dumps(body).encode()
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def listing() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Listing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_model_is_named_where_there_are_several(
    listing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Listing, "models", ["one"])
    monkeypatch.setattr(Listing, "context", {"max_model_len": 4096})
    monkeypatch.setattr(Listing, "keys", [])
    found = connect(listing, None, "secret")
    assert (found.url, found.model, found.context_tokens) == (f"{listing}/v1", "one", 4096)
    assert found.server == {"model": {"id": "one", "max_model_len": 4096},
                            "health": {"status": "ok"}}  # fmt: skip
    assert set(Listing.keys) == {"Bearer secret"}
    monkeypatch.setattr(Listing, "models", ["one", "two"])
    monkeypatch.setattr(Listing, "context", {})
    with pytest.raises(UsageError, match="serves one, two; choose with --model"):
        connect(listing, None, "none")
    assert connect(listing, None, "none", take_first=True).model == "one"
    assert connect(listing, "two", "none").context_tokens is None
    with pytest.raises(UsageError, match="no model 'three'; it serves one, two"):
        connect(listing, "three", "none")
    monkeypatch.setattr(Listing, "models", [])
    for take_first in (False, True):
        with pytest.raises(UsageError, match="serves nothing"):
            connect(listing, None, "none", take_first=take_first)
    monkeypatch.setattr(Listing, "models", None)
    with pytest.raises(UsageError, match="as an OpenAI-compatible server"):
        connect(f"{listing}/other", None, "none")


def test_a_checkpoint_is_described_by_hashes_of_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    write_tiny_checkpoint(folder, layers=1, seed=0)
    (folder / "NOTE.txt").write_text("random\n  weights\n")
    about = describe_checkpoint(folder)
    config = (folder / "config.json").read_bytes()
    assert about["config.json sha256"] == hashlib.sha256(config).hexdigest()
    assert "hf_quant_config.json sha256" not in about
    assert about["note"] == "random weights"
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    assert about["weight files"] == sizes
    weights = next(folder.glob("*.safetensors")).read_bytes()
    length = int.from_bytes(weights[:8], "little")
    assert about["headers sha256"] == hashlib.sha256(weights[8 : 8 + length]).hexdigest()


def test_a_server_that_does_not_come_up_is_told_with_its_log(tmp_path: Path) -> None:
    """And none is left behind."""
    log = tmp_path / "logs" / "serve.log"
    with (
        pytest.raises(UnsupportedError, match="did not start"),
        serve(tmp_path / "nothing", log),
    ):
        pass
    assert "nothing" in log.read_text()


@pytest.mark.parametrize(
    "status, said",
    [(500, "as an OpenAI-compatible server"), (404, "as an OpenAI-compatible server"),
     (401, "asks for an API key"), (403, "asks for an API key")],
)  # fmt: skip
def test_a_list_under_an_error_is_no_list(
    listing: str, monkeypatch: pytest.MonkeyPatch, status: int, said: str
) -> None:
    monkeypatch.setattr(Listing, "models", ["one"])
    monkeypatch.setattr(Listing, "status", status)
    with pytest.raises(UsageError, match=said):
        connect(listing, None, "none")


def test_where_nobody_answers_is_said() -> None:
    with socket.socket() as bound:  # bound, and not listening
        bound.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{bound.getsockname()[1]}"
        with pytest.raises(UsageError, match="no server answers there"):
            connect(address, None, "none")


def test_a_key_comes_from_the_variable_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY_OF_THE_TEST", "secret")
    assert read_key("KEY_OF_THE_TEST") == "secret"
    assert read_key(None) == "none"
    monkeypatch.delenv("KEY_OF_THE_TEST")
    with pytest.raises(UsageError, match="--api-key-env KEY_OF_THE_TEST: the environment has no"):
        read_key("KEY_OF_THE_TEST")


@pytest.mark.parametrize(
    "url, expected",
    [("http://localhost:1/v1", True), ("http://127.9.9.9/v1", True), ("http://[::1]:8/v1", True),
     ("http://128.0.0.1/v1", False), ("https://localhost.example/v1", False)],
)  # fmt: skip
def test_this_machine_is_known_by_its_loopback(url: str, expected: bool) -> None:
    assert is_here(url) is expected
