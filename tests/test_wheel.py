"""What `pip install .` installs: every file that is read, and commands that run without extras."""

import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from halfbyte.cli.main import COMMANDS
from halfbyte.model.tiny import write_tiny_checkpoint
from wheels import ROOT, build_wheel, tracked, unpack


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack(wheel, tmp_path_factory.mktemp("installed"))


class Done(NamedTuple):
    """How one command of the installed wheel ended."""

    status: int
    out: str
    err: str


# Loading torch takes longer than all these commands, so one process runs them one after another.
_RUN = """
import contextlib, io, json, sys
sys.path.insert(0, sys.argv[1])
for name in filter(None, sys.argv[2].split(",")):
    sys.modules[name] = None
import halfbyte
assert halfbyte.__file__.startswith(sys.argv[1]), halfbyte.__file__
from halfbyte.cli.main import main
done = []
for arguments in json.loads(sys.argv[3]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(arguments)
        except SystemExit as ended:
            status = ended.code or 0
    done.append([status, out.getvalue(), err.getvalue()])
print(json.dumps(done))
"""


def run(
    installed: Path, folder: Path, commands: Sequence[list[str]], hidden: Sequence[str] = ()
) -> list[Done]:
    """Commands of the installed wheel, in a process that cannot import `hidden` modules."""
    done = subprocess.run(
        [sys.executable, "-c", _RUN, str(installed), ",".join(hidden), json.dumps(commands)],
        cwd=folder, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [Done(*one) for one in json.loads(done.stdout.splitlines()[-1])]


def test_the_wheel_holds_every_file_that_the_source_has(wheel: Path) -> None:
    wanted = {name.removeprefix("src/") for name in tracked("src/halfbyte")}
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    assert wanted <= held, sorted(wanted - held)
    assert "halfbyte/server/grafana.json" in held
    assert wheel.stat().st_size < 3e6


@pytest.mark.timeout(240)  # three processes that load torch, on a busy machine
def test_an_installed_wheel_works_elsewhere(installed: Path, tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "fp8", layers=6, dialect="mistral-fp8")
    quick = ["--log-level", "error"]
    commands = [
        ["plan", "fp8", "--recipe", "medium-3.5", "--no-timing", *quick],
        ["quantize", "fp8", "mixed", "--recipe", "medium-3.5", "--method", "none", *quick],
        ["verify", "mixed", "--against", "fp8", *quick],
        ["card", "mixed", *quick],
        ["serve", "--print-dashboard"],
    ]
    for arguments, done in zip(commands, run(installed, tmp_path, commands), strict=True):
        assert done.status == 0, (arguments, done)
    assert (tmp_path / "mixed" / "model.safetensors").exists()


_EXTRAS = {
    "eval": ("inspect_ai", "openai", "math_verify", "if_verifiable", "nltk"),
    "hub": ("huggingface_hub",),
    "demo": ("gguf", "matplotlib"),
    "otel": ("opentelemetry",),
}


@pytest.mark.timeout(240)  # three processes that load torch, on a busy machine
def test_without_extras_a_command_runs_or_says_which_it_needs(
    installed: Path, tmp_path: Path
) -> None:
    write_tiny_checkpoint(tmp_path / "fp8", layers=6, dialect="mistral-fp8")
    at = "owner/name@0123456789012345678901234567890123456789"
    lacking = [
        ("eval", ["evaluate", "http://127.0.0.1:9", "--suite", "seed", "--out", "run"]),
        ("eval", ["evaluate", "fp8", "--suite", "quick", "--out", "run"]),
        ("hub", ["quantize", at, "out", "--recipe", "medium-3.5", "--hub"]),
        ("demo", ["demo", "--out", "demo"]),
        ("otel", ["serve", "fp8", "--port", "0", "--otlp-endpoint", "http://127.0.0.1:9"]),
    ]
    running = [["evaluate", "plan"], ["evaluate", "plan", "--suite", "seed"]]
    running += [[name, "--help"] for name in COMMANDS]
    hidden = [module for modules in _EXTRAS.values() for module in modules]
    done = run(installed, tmp_path, [*(arguments for _, arguments in lacking), *running], hidden)
    for (extra, arguments), one in zip(lacking, done, strict=False):
        last = one.err.strip().splitlines()[-1]
        assert one.status == 2 and "Traceback" not in one.err, (arguments, one)
        assert last.startswith("error: "), (arguments, last)
        assert f"pip install '.[{extra}]' in its folder" in last, (arguments, last)
    for arguments, one in zip(running, done[len(lacking) :], strict=True):
        assert one.status == 0, (arguments, one)


def test_nobody_is_told_to_install_halfbyte_from_an_index() -> None:
    """It is on none: the name could be a stranger's tomorrow."""
    told = re.compile(r"pip3? install [^\n`]*['\" ]halfbyte(?:\[|['\"`\s]|$)")
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("src/**/*.py")]
    found = [str(page) for page in pages if told.search(page.read_text(encoding="utf-8"))]
    assert not found


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.demo_model
def test_the_demo_runs_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    (done,) = run(installed, tmp_path, [["demo", "--out", "demo"]])
    assert done.status == 0, done.err[-2000:]
    assert (tmp_path / "demo" / "mixed").is_dir()
