"""A server beside us: it answers before it is used, and it ends with us, well or not."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from halfbyte.child import Child, free_port, served
from halfbyte.errors import CapacityError, UnsupportedError


def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """`python -m halfbyte` becomes a program of ours for the children of this test."""
    package = tmp_path / "stub" / "halfbyte"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.chdir(package.parent)


ANSWERING = """
import http.server, os, sys
port = int(sys.argv[sys.argv.index("--port") + 1])
print(sys.argv[1:], os.environ.get("OF_THE_CHILD"), flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    asked = 0
    def do_GET(self):
        Handler.asked += 1
        self.send_response(503 if Handler.asked < 3 else STATUS)
        self.end_headers()
    def log_message(self, *args): pass
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.mark.parametrize("status", [200, 404])
def test_the_body_runs_once_the_server_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    stub(tmp_path, monkeypatch, ANSWERING.replace("STATUS", str(status)))
    log = tmp_path / "logs" / "server.log"
    with served(tmp_path, "--x", 3, log=log, environment={"OF_THE_CHILD": "yes"}) as server:
        assert httpx.get(server.url).status_code == status
        assert server.cpu_s() > 0
    said = log.read_text()
    assert f"'serve', '{tmp_path}'" in said and "'--x', '3'" in said and "yes" in said
    assert server.process.poll() is not None and server.end() == server.process.returncode


def test_a_server_that_dies_is_said_with_the_end_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub(tmp_path, monkeypatch, "raise SystemExit('the weights are not there')")
    with (
        pytest.raises(UnsupportedError, match="the weights are not there"),
        served(tmp_path, log=tmp_path / "log"),
    ):
        pytest.fail("there is no server")


def test_a_server_that_never_answers_is_given_up_and_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub(tmp_path, monkeypatch, "import time; time.sleep(100)")
    with (
        pytest.raises(CapacityError, match="not ready after 0 s"),
        served(tmp_path, log=tmp_path / "log", start_limit_s=0.3),
    ):
        pytest.fail("there is no server")


def test_an_error_of_the_body_ends_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub(tmp_path, monkeypatch, ANSWERING.replace("STATUS", "200"))
    servers = []

    def fail() -> None:
        with served(tmp_path, log=tmp_path / "log") as server:
            servers.append(server)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert servers[0].process.poll() is not None


def test_a_server_that_ignores_the_request_to_end_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("halfbyte.child._END_LIMIT_S", 0.3)
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "print(1, flush=True); time.sleep(100)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None and process.stdout.readline()
    started = time.monotonic()
    assert Child("http://127.0.0.1:1", process).end() == -9
    process.stdout.close()
    assert time.monotonic() - started < 20


def test_a_free_port_can_be_bound() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", free_port()))
