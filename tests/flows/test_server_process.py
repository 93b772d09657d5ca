"""`halfbyte serve` and `halfbyte chat` as processes: greeting, draining, refusals."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from follower_processes import engines_of, followers_of, is_running, until_gone
from halfbyte.cli.main import main
from halfbyte.model.tiny import tiny_config, write_tiny_checkpoint

DATA = Path(__file__).parent.parent / "data" / "chat"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    config = tiny_config(layers=1)
    text = dataclasses.replace(config.text, vocab_size=448)
    write_tiny_checkpoint(path, config=dataclasses.replace(config, text=text))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DATA / "chatml" / name, path)
    return path


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "halfbyte", *map(str, arguments)]


def halfbyte(*arguments: object, **options: Any) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=50, env=ENVIRONMENT, **options
    )


@contextlib.contextmanager
def served(
    directory: Path,
    *arguments: object,
    cache: tuple[object, ...] = ("--kv-cache-tokens", 4096),
    environment: dict[str, str] = ENVIRONMENT,
) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """A server on a free port; gives the process, its URL and its greeting."""
    flags = ("--port", 0, "--max-model-len", 2048, *cache, *arguments)
    process = subprocess.Popen(
        command("serve", directory, *flags),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    try:
        greeting = ""
        while "Ctrl-C" not in greeting:
            line = process.stdout.readline()
            assert line, f"the server ended: {greeting}"
            greeting += line
        url = next(word for word in greeting.split() if word.endswith("/v1")).removesuffix("/v1")
        yield process, url, greeting
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_drains_on_sigterm_and_ends_well(directory: Path) -> None:
    with served(directory, "--served-model-name", "tiny", "alias") as (process, url, greeting):
        assert "tiny is ready at" in greeting and "2048" in greeting and "4096" in greeting
        body = {
            "model": "alias",
            "prompt": "Hello",
            "max_tokens": 300,
            "ignore_eos": True,
            "stream": True,
        }
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=40) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line.startswith("data: ")]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
        assert process.wait(timeout=10) == 0


def test_operators_flags(directory: Path, tmp_path: Path) -> None:
    """An admin listener, an access log in a file, a changed limit; draining by hand, the end."""
    log = tmp_path / "access.jsonl"
    flags = ("--admin-port", 0, "--access-log", log, "--limit", "choices=1")
    with served(directory, *flags) as (process, url, greeting):
        admin = next(word for word in greeting.split() if word.startswith("http"))
        assert admin != url
        body = {"model": "tiny", "prompt": "Hello", "max_tokens": 2, "n": 2}
        refused = httpx.post(f"{url}/v1/completions", json=body)
        assert refused.status_code == 400 and "limit is 1" in refused.text
        answered = httpx.post(f"{url}/v1/completions", json={**body, "n": 1})
        assert answered.status_code == 200
        assert httpx.get(f"{admin}/state").json()["process"]["open_files"] > 0
        assert httpx.post(f"{admin}/drain").json()["draining"] is True
        assert httpx.get(f"{url}/ready").status_code == 503
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["status"] for line in lines if line["path"] == "/v1/completions"] == [400, 200]
    assert any(line.get("answer_id") == answered.json()["id"] for line in lines)


def test_vllm_is_started_restarted_and_ended(directory: Path, tmp_path: Path) -> None:
    """What stands in for vLLM takes its flags and streams as it does, but runs no model."""
    stand_in = Path(__file__).parent / "vllm_stand_in.py"
    program = tmp_path / "vllm"
    program.write_text(f"#!{sys.executable}\n{stand_in.read_text()}")
    program.chmod(0o755)
    environment = {**ENVIRONMENT, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    engine = ("--engine", "vllm", "--api-key", "sesame")
    with served(directory, *engine, cache=(), environment=environment) as (process, url, greeting):
        assert "answers come from vLLM" in greeting
        inner = "http://127.0.0.1:" + greeting.split("vLLM on port ")[1].split(",")[0]
        body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}
        assert httpx.post(f"{inner}/v1/chat/completions", json=body).status_code == 401

        def ask() -> httpx.Response:
            headers = {"Authorization": "Bearer sesame"}
            return httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers)

        assert ask().json()["choices"][0]["message"]["content"] == "Hello"
        assert httpx.post(f"{url}/v1/chat/completions", json=body).status_code == 401
        with contextlib.suppress(httpx.HTTPError):
            httpx.post(f"{inner}/die")
        deadline = time.monotonic() + 30
        # On a busy machine it may be back before anybody has asked.
        while httpx.get(f"{url}/health").json()["engine_restarts"] != 1 or ask().status_code != 200:
            assert ask().status_code in (200, 503)
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"{inner}/health")


def test_idle_server_stops_quickly_and_frees_its_port(directory: Path) -> None:
    with served(directory) as (process, url, _):
        assert httpx.get(f"{url}/health").status_code == 200
        started = time.perf_counter()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 0
        assert time.perf_counter() - started < 5
        port = int(url.rsplit(":", 1)[1])
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0


COMPLETION = {"model": "tiny", "prompt": "Hello", "temperature": 0, "ignore_eos": True}


def end_in_mid_stream(url: str, victim: int, number: signal.Signals) -> str:
    """What a stream still said when a process that makes it was ended."""
    long = COMPLETION | {"max_tokens": 1900, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=long, timeout=40) as response:
        lines = response.iter_lines()
        next(lines)
        os.kill(victim, number)
        return "".join(lines)


def text_once_back(url: str) -> str:
    """The answer of the engine that is loaded after one has died."""
    end = time.monotonic() + 40
    while (again := httpx.post(f"{url}/v1/completions", json=COMPLETION)).status_code == 503:
        assert time.monotonic() < end
        time.sleep(0.05)
    return text_of(again)


@pytest.fixture(scope="module")
def wanted() -> list[str]:
    """What one process answers; the first test that has a server finds out."""
    return []


def test_an_engine_that_crashes_ends_its_answers_and_comes_back(
    directory: Path, wanted: list[str]
) -> None:
    with served(directory) as (process, url, _):
        wanted.append(text_of(httpx.post(f"{url}/v1/completions", json=COMPLETION, timeout=40)))
        for restarts, number in enumerate((signal.SIGSEGV, signal.SIGKILL), 1):
            (engine,) = engines_of(process.pid)
            rest = end_in_mid_stream(url, engine, number)
            assert "error" in rest and f"process {engine} was ended by {number.name}" in rest
            assert text_once_back(url) == wanted[0]
            assert httpx.get(f"{url}/health").json()["engine_restarts"] == restarts
        (engine,) = engines_of(process.pid)
        process.kill()
        process.wait()
        # The engine leaves when nobody is there to be served.
        assert until_gone([engine])


def test_two_ranks_serve_drain_and_come_back_after_a_death(
    directory: Path, wanted: list[str]
) -> None:
    """A rank killed in mid-stream ends that answer; the next engine answers as one process does."""
    if not wanted:
        with served(directory) as (_, url, _):
            wanted.append(text_of(httpx.post(f"{url}/v1/completions", json=COMPLETION, timeout=40)))
    with served(directory, "-tp", 2) as (process, url, _):
        answer = httpx.post(f"{url}/v1/completions", json=COMPLETION, timeout=40)
        assert text_of(answer) == wanted[0]
        (rank,) = followers_of(process.pid)
        rest = end_in_mid_stream(url, rank, signal.SIGKILL)
        assert "error" in rest and f"process {rank} was ended by SIGKILL" in rest
        assert text_once_back(url) == wanted[0]
        (rank,) = followers_of(process.pid)
        short = COMPLETION | {"max_tokens": 300, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=short, timeout=40) as response:
            lines = response.iter_lines()
            next(lines)
            # As a service manager does: every process of the group gets the signal.
            for pid in (rank, process.pid):
                os.kill(pid, signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert process.wait(timeout=20) == 0
        assert not followers_of(process.pid)
        assert not is_running(rank)


def text_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["text"]
    return text


def test_chat_once_speaks_to_a_server_with_a_key(directory: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# the team's\nsesame\n")
    card = (  # what people type who come from the model card's command
        "--tensor-parallel-size", 1, "--gpu-memory-utilization", 0.9, "--dtype", "bfloat16",
        "--served-model-name", "tiny", "--host", "127.0.0.1", "--api-key", "open",
        "--config-format", "hf", "--trust-remote-code",
    )  # fmt: skip
    with served(directory, "--api-key-file", keys, *card) as (_, url, greeting):
        for flag in ("--config-format", "--trust-remote-code"):
            assert f"{flag} is not needed; the checkpoint says it" in greeting
        assert "tiny is ready at" in greeting and "API key required" in greeting
        asked = ("chat", url, "--once", "Hello", "--max-tokens", 5)
        refused = halfbyte(*asked)
        assert refused.returncode == 2 and "no API key" in refused.stderr
        answered = halfbyte(*asked, "--api-key", "sesame")
        assert answered.returncode == 0, answered.stderr
        assert answered.stdout.strip()
        piped = halfbyte("chat", url, "--api-key", "sesame", "--max-tokens", 5, input="Hi\n/new\n")
        assert piped.returncode == 0 and "tokens, first after" in piped.stdout


def test_chat_once_with_a_directory(directory: Path) -> None:
    answered = halfbyte("chat", directory, "--once", "-", "--max-tokens", 5, input="Hello")
    assert answered.returncode == 0, answered.stderr
    assert answered.stdout.strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("serve", "/nowhere"), "/nowhere: no such directory"),
        (("serve", "DIR", "--port", 70000), "70000 is not a port"),
        (("serve", "DIR", "--tensor-parallel-size", 3, "--port", 0), "tensor"),
        (("serve", "DIR", "--max-model-len", 10**9, "--port", 0), "max_model_len"),
        (("serve", "DIR", "--admin-port", -1), "-1 is not a port"),
        (
            ("serve", "DIR", "--limit", "imges=3"),
            "no limit is called 'imges'; there are: body_bytes",
        ),
        (("serve", "DIR", "--access-log", "/nowhere/x"), "cannot write the access log"),
        (("serve", "DIR", "--api-key-file", "/nowhere", "--port", 0), "cannot read keys"),
        (("chat", "/nowhere"), "neither a directory nor"),
        (("chat", "http://127.0.0.1:9", "--once", "x"), "does not answer"),
    ],
)
def test_mistakes_are_one_sentence(
    directory: Path,
    arguments: tuple[object, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [str(directory if part == "DIR" else part) for part in arguments]
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_port_in_use_is_said_before_anything_is_loaded(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["serve", str(directory), "--port", str(taken.getsockname()[1])]) == 2
    error = capsys.readouterr().err
    assert "cannot listen" in error and "weights" not in error
