"""Flags from a file: the same values as from the command line, which wins."""

import argparse
from pathlib import Path
from typing import Any

import pytest

from halfbyte.cli import serve
from halfbyte.cli.config_file import apply_config
from halfbyte.cli.main import build_parser, main
from halfbyte.errors import UsageError


def parsed(folder: Path, text: str, *arguments: str) -> argparse.Namespace:
    file = folder / "serve.yaml"
    file.write_text(text)
    parser = build_parser("serve", serve)
    given = ["mixed/", "--config", str(file), *arguments]
    apply_config(parser, given)
    return parser.parse_args(given)


TEXT = """\
port: 9000
served-model-name: [medium, small]
max_model_len: 65536
strict-effort: true
ray: false
unknown-fields: refuse
gpu-memory-utilization: 0.8
limit: [choices=4]
api-key: one
access-log: access.jsonl
"""


def test_a_file_says_what_flags_say(tmp_path: Path) -> None:
    args = parsed(tmp_path, TEXT)
    assert (args.port, args.max_model_len, args.gpu_memory_utilization) == (9000, 65536, 0.8)
    assert args.served_model_name == ["medium", "small"] and args.access_log == Path("access.jsonl")
    assert args.strict_effort and not args.ray and args.unknown_fields == "refuse"
    assert args.limit == ["choices=4"] and args.api_key == ["one"]


def test_the_command_line_wins_and_adds(tmp_path: Path) -> None:
    args = parsed(tmp_path, TEXT, "--port", "1", "--served-model-name", "x", "--limit", "stops=2")
    assert args.port == 1 and args.served_model_name == ["x"]
    assert args.limit == ["choices=4", "stops=2"]
    # A parser that is made anew knows nothing of the file.
    assert build_parser("serve", serve).parse_args(["mixed/"]).port == 8000


@pytest.mark.parametrize(
    "text, said",
    [
        ("prot: 1", "did you mean port"),
        ("directory: x", "no flag"),
        ("config: x", "no flag"),
        ("port: [1]", "takes a number"),
        ("port: many", "is no whole number"),
        ("port: true", "takes a number"),
        ("ray: 1", "true or false"),
        ("dialect: french", "is not one of auto"),
        ("- port", "each as NAME: VALUE"),
        ("port: 1\nport: 2", "occurs twice"),
        ("port: {", "is not valid YAML"),
        ("? [a]\n: 1", "is not valid YAML"),
    ],
)
def test_what_is_wrong_in_a_file_is_one_sentence(
    tmp_path: Path, text: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match=said):
        parsed(tmp_path, text)
    assert main(["serve", "x", "--config", str(tmp_path / "serve.yaml")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "x", "--config", str(tmp_path / "no.yaml")]) == 2
    assert "no.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_shells_get_a_script_with_every_command(
    shell: str, capsys: pytest.CaptureFixture[Any]
) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in ("quantize", "serve", "compare-evals", "served-model-name"):
        assert word in script
