"""A stranger's first hour, from the wheel to a published card: every command as it is typed.

Pocket, the small model of the repository, is quantized on own data, with mistakes and interruptions
on the way. No command may end in a traceback or lose anything, and what is printed as the next step
must work as it is printed.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
import venv
from pathlib import Path
from typing import Any

import pytest

from evals_stub import Reply, completion, serving
from halfbyte.errors import UnsupportedError
from halfbyte.evals.sandbox import isolation
from hub_stand_in import NAME, serving_hub
from wheels import ROOT, build_wheel, command_of, unpack

pytest.importorskip("inspect_ai", reason="extra 'eval' is not installed")
pytest.importorskip("huggingface_hub", reason="extra 'hub' is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

_SMALL = ["--limit", "6", "--max-tokens", "48", "--reasoning-effort", "none"]


def _as_in_a_terminal() -> None:
    """Ctrl-C counts, also where these tests run in a shell's background, which ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """A folder in which commands are typed."""

    def __init__(self, folder: Path, path: Path) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "PATH": f"{path}:{os.environ['PATH']}",
            "HF_TOKEN": "hf_stand_in",
            "HF_HUB_DISABLE_XET": "1",
        }
        self.environment.pop("PYTHONPATH", None)

    def start(self, command: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            shlex.split(command), cwd=self.folder, env=self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=_as_in_a_terminal,
        )  # fmt: skip

    def run(self, command: str, status: int = 0) -> tuple[str, str]:
        """What it printed; it must end with `status` and without a traceback."""
        running = self.start(command)
        out, err = running.communicate(timeout=600)
        assert "Traceback" not in err, (command, err)
        assert running.returncode == status, (command, running.returncode, out, err)
        return out, err

    def refused(self, command: str, said: str) -> None:
        """A mistake ends with one sentence that names it."""
        _, err = self.run(command, status=2)
        assert said in err.strip().splitlines()[-1], err

    def interrupt(self, command: str, when: Path) -> str:
        """Ctrl-C once `when` is there; what was said of it."""
        running = self.start(command)
        until = time.monotonic() + 300
        while not when.exists() and running.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=120)
        assert "Traceback" not in err, err
        assert running.returncode == 130, (running.returncode, err)
        return err.strip().splitlines()[-1]

    def serve(self, command: str) -> str:
        """A server as it is typed: it gets ready, answers, and ends when it is told to."""
        running = self.start(command)
        assert running.stdout is not None
        # It prints its address once it is ready, and little beside that.
        seen = iter(running.stdout.readline, "")
        address = next(filter(None, (re.search(r"http://127\.0\.0\.1:\d+", x) for x in seen)))[0]
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"{address}/v1/models", timeout=5) as answer:
                    (model,) = json.load(answer)["data"]
                break
            except OSError:
                time.sleep(0.2)
        running.send_signal(signal.SIGTERM)
        _, rest = running.communicate(timeout=60)
        assert running.returncode == 0 and "Traceback" not in rest, rest
        return str(model["id"])


def next_steps(err: str) -> list[str]:
    """Commands that were printed to go on with."""
    _, _, rest = err.partition("next: ")
    return [line.strip() for line in rest.splitlines() if line.strip().startswith("halfbyte ")]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `halfbyte`, as the wheel brings it."""
    folder = tmp_path_factory.mktemp("installed")
    return command_of(unpack(build_wheel(folder), folder / "site"), folder / "bin")


@pytest.fixture
def terminal(tmp_path: Path, path: Path) -> Terminal:
    folder = tmp_path / "work"
    folder.mkdir()
    shutil.copytree(ROOT / "pocket" / "model", folder / "fp8")
    text = "\n\n".join((ROOT / page).read_text() for page in ("docs/tour.md", "docs/formats.md"))
    (folder / "ours.md").write_text(text)
    (folder / "chats.jsonl").write_text(
        '{"prompt": "Hello", "response": "Good day."}\nnot JSON\n' * 9
    )
    return Terminal(folder, path)


def test_from_a_wheel_to_a_quantized_checkpoint(terminal: Terminal) -> None:
    said, _ = terminal.run("halfbyte plan fp8 --recipe medium-3.5 --text ours.md --gpu h100 b200")
    assert "rows, the longest of" in said and "needed beside the source" in said

    quantize = "halfbyte quantize fp8 mixed --recipe medium-3.5"
    terminal.refused(f"{quantize} --text ours.pdf", "--text ours.pdf")
    terminal.refused(f"{quantize} --blend chats.jsonl", "chats.jsonl")
    terminal.refused(f"{quantize} --text ours.md --memory 12", "has no unit")
    quantize += " --text ours.md"
    work = terminal.folder / ".mixed.halfbyte-work"
    kept = terminal.interrupt(quantize, work / "journal")
    assert "kept" in kept
    _, err = terminal.run(quantize)
    steps = next_steps(err)
    assert steps, err
    for step in steps:
        terminal.serve(f"{step} --port 0") if " serve " in step else terminal.run(step)
    assert not work.exists()


def test_generated_code_has_an_interpreter_or_nothing_is_asked(terminal: Terminal) -> None:
    pytest.importorskip("h5py", reason="the interpreter of generated code needs h5py")
    try:
        isolation()
    except UnsupportedError as reason:
        pytest.skip(f"no sandbox on this machine: {reason}")
    problems = ROOT / "tests" / "data" / "evals" / "scicode"
    shutil.copytree(problems, terminal.folder / "items" / "scicode")
    broken = terminal.folder / "broken"
    broken.mkdir()
    (broken / "python").write_text("#!/bin/sh\necho no such library >&2\nexit 1\n")
    (broken / "python").chmod(0o755)
    # It runs, and has none of what the tests of generated code import.
    venv.create(terminal.folder / "bare", symlinks=True)
    rows = (problems / "problems_dev_subset.jsonl").read_text().splitlines()
    steps = [step for row in rows for step in json.loads(row)["sub_steps"]]

    def answers(request: dict[str, Any]) -> Reply:
        asked = request["messages"][0]["content"].split("NEXT STEP:")[1]
        step = next(s for s in steps if s["function_header"] in asked)
        return completion(f"```python\n{step['ground_truth_code']}\n```")

    with serving(answers) as stub:
        evaluate = f"halfbyte evaluate {stub.url} --suite scicode --data items --out code-run"
        evaluate += " --limit 2 --repeats 1 --code-python"
        for python, said in (
            ("nowhere/bin/python", "nowhere/bin/python is not a Python for generated code"),
            ("broken/python", "broken/python does not run: no such library"),
            ("bare/bin/python", "cannot run SciCode's tests: it lacks numpy, scipy, h5py"),
        ):
            _, err = terminal.run(f"{evaluate} {python}", status=2)
            assert said in err, err
            assert not (terminal.folder / "code-run").exists() and not stub.requests
        # A relative path over a virtual environment's link, as the docs show it.
        (terminal.folder / "code").symlink_to(sys.prefix)
        terminal.run(f"{evaluate} code/bin/{Path(sys.executable).name} --code-wall-s 60")
        asked = len(stub.requests)
    run = json.loads((terminal.folder / "code-run" / "run.json").read_text())
    result = run["benchmarks"]["scicode"]
    assert result["items"] == asked > 1 and not result["missing"], result
    assert result["score"] == 1.0, result


def test_from_two_arms_to_a_published_card(terminal: Terminal) -> None:
    terminal.run("halfbyte quantize fp8 mixed --recipe medium-3.5 --method none")
    evaluate = f"halfbyte evaluate fp8 --suite quick --out evals/fp8 {shlex.join(_SMALL)}"
    begun = terminal.folder / "evals" / "fp8" / "quick" / "sessions.jsonl"
    assert "kept" in terminal.interrupt(evaluate, begun)
    terminal.run(evaluate)
    terminal.run(f"halfbyte evaluate mixed --suite quick --out evals/mixed {shlex.join(_SMALL)}")
    for arm in ("fp8", "mixed"):
        run = json.loads((terminal.folder / "evals" / arm / "run.json").read_text())
        (result,) = [r for r in run["benchmarks"].values() if r["name"] == "quick"]
        assert result["items"] == 6 and not result["missing"], result

    out, err = terminal.run(
        "halfbyte compare fp8 mixed --text ours.md --tokens 1024 --json near.json"
    )
    assert "KL mean" in out
    for step in next_steps(err):
        terminal.serve(f"{step} --port 0") if " serve " in step else terminal.run(step)
    terminal.run("halfbyte compare-evals evals/fp8 evals/mixed", status=3)  # too few to say
    terminal.run("halfbyte report evals/fp8 evals/mixed --out report.html")
    about = "--runs evals/fp8 evals/mixed --records near.json --licence apache-2.0"
    terminal.run(f"halfbyte card mixed {about} --title Pocket")
    card = (terminal.folder / "mixed" / "README.md").read_text()
    assert "Pocket" in card and str(terminal.folder) not in card
    terminal.run("halfbyte verify mixed --against fp8")

    with serving_hub() as hub:
        publish = f"halfbyte publish mixed {NAME} {about} --endpoint {hub.url}"
        out, _ = terminal.run(publish)
        assert "nothing was sent" in out and not hub.exists
        out, _ = terminal.run(f"{publish} --upload")
        assert "hashes equal (private" in out and hub.private
        assert {"README.md", "model.safetensors", "config.json"} <= set(hub.files)
        for name, content in hub.files.items():
            if name.endswith((".md", ".json")):
                assert str(terminal.folder).encode() not in content, name
