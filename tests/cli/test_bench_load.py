"""`halfbyte bench load`: mistakes end in one sentence before anything is spent."""

import argparse
import json
import shlex
from pathlib import Path

import pytest

from evals_stub import Script, completion, refusal, serving
from halfbyte.cli import bench, bench_load
from halfbyte.cli.main import build_parser, main


def test_examples_parse() -> None:
    for line in bench_load.EXAMPLE.splitlines():
        words = shlex.split(line)
        assert words[:3] == ["halfbyte", "bench", "load"]
        args = build_parser("bench", bench).parse_args(words[2:])
        assert isinstance(args, argparse.Namespace)


def test_help_has_examples_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "load", "--help"])
    text = capsys.readouterr().out
    assert "--serve-flags='--kv-cache fp8 --max-sequences 32'" in text
    assert "(1 8 32 64)" in text


@pytest.mark.parametrize(
    "words, said",
    [
        (["nowhere/"], "nowhere/ is neither a folder nor the address of a server"),
        (["http://127.0.0.1:9"], "no server answers there"),
        (["http://127.0.0.1:9", "--serve-flags=--kv-cache fp8"], "flags of halfbyte serve are for"),
        (["http://127.0.0.1:9", "--against", "no.json"], "no.json is not a benchmark record"),
        (["http://127.0.0.1:9", "--record", "no/where/r.json"], "there is no folder no/where"),
        (["http://127.0.0.1:9", "--api-key-env", "NO_SUCH_KEY"], "no such variable"),
        (["ftp://x"], "is not the address of a server"),
    ],
)
def test_a_mistake_is_a_sentence(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "load", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "script, flags, context, said",
    [
        (lambda body: refusal(401, "no key"), [], None, "asks for an API key (status 401: no key)"),
        (lambda body: completion("Hello"), [], None, "does not stream"),
        (lambda body: completion("Hello"), ["--model", "other"], None, "it serves stub"),
        (lambda body: completion("Hello"), [], 128, "the context is 128 tokens"),
        (
            lambda body: refusal(404, "gone"),
            [],
            None,
            "no model 'stub' for chats (status 404: gone)",
        ),
    ],
)
def test_a_server_that_cannot_be_measured_is_said_in_a_sentence(
    script: Script, flags: list[str], context: int | None, said: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with serving(script, context_tokens=context) as stub:
        assert main(["bench", "load", stub.url, *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert list(tmp_path.iterdir()) == []


def test_another_record_is_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cpu.json"
    record = {"name": "cpu", "command": "c", "date": "d", "machine": {}, "results": {}}
    path.write_text(json.dumps(record))
    assert main(["bench", "load", str(path)]) == 2
    assert "a record of 'cpu', not of halfbyte bench load" in capsys.readouterr().err
