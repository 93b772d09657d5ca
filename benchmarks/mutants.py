"""Which faults would the tests notice? One small fault at a time is put into a copy of the source.

Question: how many of such faults (a comparison turned, a statement dropped, a constant moved) make
a test fail, and which do not?

Method: the standard `ast` names every place where a fault fits, a sample with a fixed seed is taken
of each file. The tests that mirror the file (and those named in `MORE_TESTS`) run once under
coverage, which says what test runs which line and how long it takes. A mutant then meets the tests
that run its line, quick ones first, until one fails. Every mutant runs in a forked child of a
process that has the heavy packages loaded already, against a copy of `src` of its own, so that
programs started by a test see the fault, too. Which faults there are: faults.py.

Cost model: one run of each file's tests under coverage, then two seconds a mutant on an idle core,
and all covering tests (at most `--test-seconds`) for one that lives.

Reading the result: `survived` are holes in the tests or faults without effect. Those that were
looked at stand in mutants_kept.json with their reason; `equivalent` ones cannot be noticed by any
test and leave the count, `cosmetic` ones change words or speed alone and stay in it. `uncovered`
counts as survived, `time` (the fault made an endless loop, or the machine was busy) as killed.

Last record: benchmarks/records/mutants.json; results of each mutant: build/mutants/results.jsonl.
A second run goes on where the first ended; `--again` tries what has survived with all tests of its
file, whatever time they take. `at_first_try` counts what was noticed before such a second look, and
so before tests were written for it, of the faults of which that is known.

Run: make mutants, or benchmarks/mutants.py src/halfbyte/evals/judging/stats.py
"""

import argparse
import collections
import contextlib
import hashlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import coverage
import pytest
from faults import Mutant, mutants_of

from halfbyte.bench import record
from halfbyte.figures import Figure

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "records" / "mutants.json"
KEPT = ROOT / "benchmarks" / "mutants_kept.json"
WORK = ROOT / "build" / "mutants"
RESULTS = WORK / "results.jsonl"
SOURCE = Path("src/halfbyte")
ROOMS = ("formats", "quantize", "checkpoint", "evals", "server")
ENGINE = ("plan/scheduler", "plan/blocks", "plan/speculation", "plan/pacing", "plan/sequence")
ENGINE += ("plan/step", "request", "slices", "masks")
HEAVY = ("torch", "numpy", "scipy.stats", "pydantic", "fastapi", "httpx", "safetensors.torch")
PYTEST = (
    *("-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0"),
    *("-m", "not slow and not gpu and not multi_gpu"),
    *("-W", "ignore::pytest.PytestAssertRewriteWarning"),
)

# Packages that pytest wants to load itself, as its plugins or theirs.
_LEFT_TO_PYTEST = {"pytest", "hypothesis", "schemathesis", "anyio", "coverage", "xdist"}

# Tests beside the mirrored one of each file, from tests/.
MORE_TESTS: dict[str, tuple[str, ...]] = {
    "checkpoint/gguf": ("checkpoint/test_gguf_hostile.py",),
    "checkpoint/gguf_header": ("checkpoint/test_gguf.py", "checkpoint/test_gguf_hostile.py"),
    "checkpoint/gguf_tokenizer": ("checkpoint/test_gguf.py", "checkpoint/test_gguf_hostile.py"),
    "checkpoint/inventory": ("checkpoint/test_verify.py",),
    "checkpoint/manifest": (
        "checkpoint/test_writer.py",
        "quantize/test_soundness.py",
        "quantize/test_resume.py",
    ),
    "checkpoint/native_fields": ("checkpoint/test_fields.py",),
    "checkpoint/shards": ("checkpoint/test_corruption.py", "checkpoint/test_reader.py"),
    "checkpoint/soundness": ("quantize/test_soundness.py", "checkpoint/test_verify.py"),
    "checkpoint/strict_fields": ("checkpoint/test_fields.py",),
    "checkpoint/untrained_tower": ("flows/test_untrained_tower.py",),
    "checkpoint/verify_values": ("checkpoint/test_verify.py",),
    "checkpoint/written_metadata": ("checkpoint/test_metadata.py",),
    "engine/plan/sequence": (
        "engine/test_scheduler.py",
        "engine/test_step.py",
        "engine/test_images.py",
    ),
    "engine/request": ("engine/test_sampler.py", "engine/test_core.py"),
    "evals/config": ("evals/test_tasks.py", "evals/test_looks.py"),
    "evals/grading/constraints": ("evals/test_language_data.py",),
    "evals/grading/letters": ("evals/test_letter_phrasings.py", "evals/test_extraction.py"),
    "evals/grading/numbers": ("evals/test_number_phrasings.py", "evals/test_extraction.py"),
    "evals/grading/scicode_runtime": ("evals/test_scripts.py",),
    "evals/grading/scicode_tester": ("evals/test_scripts.py", "evals/test_hostile_code.py"),
    "evals/grading/scicode_wire": ("evals/test_scripts.py", "evals/test_hostile_code.py"),
    "evals/grading/scicode_worker": ("evals/test_scripts.py", "evals/test_hostile_code.py"),
    "evals/grading/scripts": ("evals/test_hostile_code.py", "evals/test_extraction.py"),
    "evals/grading/statements": (
        "evals/test_letters.py",
        "evals/test_letter_phrasings.py",
        "evals/test_number_phrasings.py",
    ),
    "evals/judging/compare": ("evals/test_looks.py",),
    "evals/judging/guards": ("evals/test_compare.py",),
    "evals/judging/looks": ("evals/test_compare.py",),
    "evals/judging/render": ("evals/test_compare.py", "flows/test_evals_pages.py"),
    "evals/judging/summary": (
        "evals/test_compare.py",
        "evals/test_records.py",
        "flows/test_evals_pages.py",
    ),
    "evals/reasoning": ("evals/test_extraction.py", "evals/test_records.py"),
    "evals/running/ask": ("evals/test_evaluate.py", "flows/test_evals_run.py"),
    "evals/running/evaluate": ("flows/test_evals_run.py",),
    "evals/running/progress": ("flows/test_evals_run.py",),
    "evals/running/regrade": ("flows/test_evals_run.py", "evals/test_records.py"),
    "evals/running/run": ("evals/test_evaluate.py", "flows/test_evals_run.py"),
    "evals/sandbox_init": ("evals/test_sandbox.py", "evals/test_hostile_code.py"),
    "evals/score": ("evals/test_stats.py", "evals/test_bounds.py"),
    "evals/types": ("evals/test_score.py", "evals/test_records.py", "evals/test_tasks.py"),
    "formats/measure": ("quantize/test_layer.py",),
    "formats/nvfp4": ("quantize/test_scales.py",),
    "quantize/charts": ("quantize/test_page.py",),
    "quantize/encode": ("quantize/test_layer.py",),
    "quantize/entry": ("test_library.py",),
    "quantize/export": ("quantize/test_interop.py", "quantize/test_pipeline.py"),
    "quantize/job": (
        "quantize/test_pipeline.py",
        "quantize/test_capacity.py",
        "quantize/test_resume.py",
        "quantize/test_soundness.py",
    ),
    "quantize/journal": ("quantize/test_resume.py",),
    "quantize/layer": ("quantize/test_soundness.py",),
    "quantize/memory": ("quantize/test_memory_kept.py",),
    "quantize/methods": ("quantize/test_pipeline.py",),
    "quantize/plan_text": ("quantize/test_capacity.py",),
    "quantize/record": ("quantize/test_page.py",),
    "quantize/rehearsal": ("quantize/test_capacity.py",),
    "quantize/report": ("quantize/test_page.py", "quantize/test_pipeline.py"),
    "quantize/source_proof": ("quantize/test_resume.py", "quantize/test_soundness.py"),
    "server/api/admission": ("server/test_admission.py", "server/test_app.py"),
    "server/api/answers": (
        "server/test_completion.py",
        "server/test_app.py",
        "server/test_chat_api.py",
    ),
    "server/api/backend": ("server/test_app.py", "server/test_chat_api.py"),
    "server/api/chat": ("server/test_chat_api.py", "server/test_token_ids.py"),
    "server/api/completion": (
        "server/test_app.py",
        "server/test_chat_api.py",
        "server/test_text_api.py",
    ),
    "server/api/foreign": ("server/test_chat_api.py",),
    "server/api/messages": ("server/test_messages_api.py",),
    "server/api/messages_blocks": (
        "server/test_messages_api.py",
        "server/test_same_conversation.py",
        "server/test_errors.py",
    ),
    "server/api/messages_wire": ("server/test_messages_api.py", "server/test_same_conversation.py"),
    "server/api/paths": ("server/test_errors.py", "server/test_same_conversation.py"),
    "server/api/pieces": ("server/test_completion.py", "server/test_chat_api.py"),
    "server/api/prepare": (
        "server/test_chat_api.py",
        "server/test_bounds.py",
        "server/test_text_api.py",
        "server/test_foreign.py",
        "server/test_limits.py",
        "server/test_errors.py",
    ),
    "server/api/preparer": ("server/test_chat_api.py", "server/test_app.py"),
    "server/api/problems": ("server/test_errors.py", "server/test_messages_api.py"),
    "server/api/prompts": (
        "server/test_chat_api.py",
        "server/test_text_api.py",
        "server/test_bounds.py",
        "server/test_fetch.py",
        "server/test_errors.py",
    ),
    "server/api/reader": ("server/test_aside.py", "server/test_token_ids.py"),
    "server/api/reading": (
        "server/test_bounds.py",
        "server/test_errors.py",
        "server/test_mutated_bodies.py",
    ),
    "server/api/responses": ("server/test_responses_api.py",),
    "server/api/responses_wire": (
        "server/test_responses_api.py",
        "server/test_same_conversation.py",
    ),
    "server/api/running": ("server/test_app.py", "server/test_chat_api.py"),
    "server/api/rules": (
        "server/test_chat_api.py",
        "server/test_bounds.py",
        "server/test_errors.py",
        "server/test_limits.py",
    ),
    "server/api/stream": (
        "server/test_chat_api.py",
        "server/test_keep_alive.py",
        "server/test_limits.py",
        "server/test_responses_api.py",
    ),
    "server/api/text": ("server/test_text_api.py", "server/test_token_ids.py"),
    "server/api/texts": ("server/test_bounds.py",),
    "server/api/tool_names": ("server/test_chat_api.py", "server/test_messages_api.py"),
    "server/api/wire": (
        "server/test_chat_api.py",
        "server/test_errors.py",
        "server/test_foreign.py",
        "server/test_text_api.py",
    ),
    "server/call": ("server/test_admin.py", "server/test_app.py"),
    "server/config": (
        "server/test_limits.py",
        "server/test_launch.py",
        "server/test_bounds.py",
        "server/test_app.py",
    ),
    "server/http/app": ("server/test_errors.py", "server/test_chat_api.py"),
    "server/http/gate": ("server/test_app.py", "server/test_origins.py", "server/test_admin.py"),
    "server/http/state": ("server/test_app.py", "server/test_admin.py"),
    "server/http/pages": ("server/test_app.py", "server/test_docs.py", "server/test_markdown.py"),
    "server/ops/metrics": ("server/test_completion.py", "server/test_app.py"),
    "server/ops/process_figures": ("server/test_metrics.py",),
    "server/ops/tracing": ("server/test_admin.py",),
    "server/run": (
        "server/test_terminal.py",
        "server/test_vllm_upstream.py",
        "flows/test_server_connections.py",
        "flows/test_server_process.py",
    ),
    "server/vllm/command": ("server/test_vllm_command.py",),
    "server/vllm/process": ("server/test_vllm_command.py", "flows/test_server_process.py"),
    "server/vllm/upstream": ("server/test_vllm_upstream.py",),
}

ALIVE = ("survived", "uncovered")


class Covered(NamedTuple):
    """What the tests of a file run: seconds by test, tests by line (module level: line 0)."""

    seconds: dict[str, float]
    tests_by_line: dict[int, list[str]]
    failing: list[str]


# ------------------------------------------------------------------------------- running tests


class Measuring:
    """A plugin: seconds of each test, and the lines it runs of one file."""

    def __init__(self, source: Path, most_seconds: float) -> None:
        self.coverage = coverage.Coverage(data_file=None, include=[str(source)], config_file=False)
        self.source = source
        self.most_seconds = most_seconds
        self.seconds: dict[str, float] = collections.defaultdict(float)
        self.failing: list[str] = []
        self.coverage.start()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        """What a fixture runs counts for every test of its file."""
        self.coverage.switch_context(item.nodeid.split("::")[0])
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        self.coverage.switch_context(item.nodeid)
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Iterator[None]:
        self.coverage.switch_context(item.nodeid.split("::")[0])
        return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.failing.append(report.nodeid)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> None:
        if sum(self.seconds.values()) > self.most_seconds:
            item.session.shouldstop = "enough was measured"

    def result(self) -> Covered:
        self.coverage.stop()
        data = self.coverage.get_data()
        by_line: dict[int, list[str]] = {}
        sound = [test for test in self.seconds if test not in self.failing]
        for line, contexts in data.contexts_by_lineno(str(self.source)).items():
            named = {context for context in contexts if context}
            if not named:
                by_line[line] = sound  # runs while the file is imported
                continue
            by_line[line] = [
                test for test in sound if test in named or test.split("::")[0] in named
            ]
        by_line[0] = sound
        return Covered(dict(self.seconds), by_line, self.failing)


class Chosen:
    """A plugin: only the chosen tests, in their order, or whole files; writes down what fails."""

    def __init__(self, tests: Sequence[str], said: Path) -> None:
        self.is_all = not any("::" in test for test in tests)
        self.order = {test: place for place, test in enumerate(tests)}
        self.said = said

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.is_all:
            return
        items[:] = sorted(
            (item for item in items if item.nodeid in self.order),
            key=lambda item: self.order[item.nodeid],
        )

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.said.write_text(report.nodeid)


class Bench:
    """A copy of `src` whose files are changed one at a time, and the children that test it."""

    def __init__(self, number: int) -> None:
        self.source = WORK / f"src-{number}"
        shutil.rmtree(self.source, ignore_errors=True)
        shutil.copytree(ROOT / "src", self.source, ignore=shutil.ignore_patterns("__pycache__"))
        self.changes = 1_000_000_000
        self.said = WORK / f"said-{number}.txt"
        self.output = WORK / f"output-{number}.txt"

    def file(self, path: str) -> Path:
        return self.source / Path(path).relative_to("src")

    def measure(self, path: str, tests: Sequence[str], most_seconds: float) -> Covered:
        def child() -> int:
            measuring = Measuring(self.file(path), most_seconds)
            arguments = [argument for argument in PYTEST if argument != "-x"]
            pytest.main([*arguments, *self._settings(), *tests], plugins=[measuring])
            result = measuring.result()
            packages = [
                name
                for name, module in sys.modules.items()
                if "site-packages" in (getattr(module, "__file__", None) or "")
            ]
            self.said.write_text(json.dumps({**result._asdict(), "packages": packages}))
            return 0

        self.said.unlink(missing_ok=True)
        self._in_child(child, 4 * most_seconds + 300)
        if not self.said.exists():
            raise SystemExit(f"{path}: its tests did not end; see {self.output}")
        found = json.loads(self.said.read_text())
        # What the tests import is loaded once, here, for all children to come.
        for name in found["packages"]:
            if name not in sys.modules and not _LEFT_TO_PYTEST & set(re.split(r"[._]", name)):
                with contextlib.suppress(Exception), warnings.catch_warnings():
                    importlib.import_module(name)
        if not found["seconds"]:
            raise SystemExit(f"{path}: none of its tests ran; see {self.output}")
        by_line = {int(line): names for line, names in found["tests_by_line"].items()}
        return Covered(found["seconds"], by_line, found["failing"])

    def verdict(self, mutant: Mutant, tests: Sequence[str], limit_s: float) -> tuple[str, str]:
        """`killed`, `time` or `survived`, and the test that failed."""
        file = self.file(mutant.path)
        sound = file.read_bytes()
        self._replace(file, sound[: mutant.start] + mutant.became.encode() + sound[mutant.stop :])
        self.said.unlink(missing_ok=True)

        def child() -> int:
            files = list(dict.fromkeys(test.split("::")[0] for test in tests))
            return int(
                pytest.main(
                    [*PYTEST, *self._settings(), *files], plugins=[Chosen(tests, self.said)]
                )
            )

        try:
            status = self._in_child(child, limit_s)
        finally:
            self._replace(file, sound)
        by = self.said.read_text() if self.said.exists() else ""
        if status is None:
            return "time", by
        return ("survived", "") if status == pytest.ExitCode.OK else ("killed", by or "import")

    def _replace(self, file: Path, content: bytes) -> None:
        """Each content gets a time of its own, or Python would take the bytecode of the last."""
        file.write_bytes(content)
        self.changes += 1
        os.utime(file, (self.changes, self.changes))

    def _settings(self) -> list[str]:
        return ["-o", f"pythonpath={self.source} {ROOT / 'tests'}", "--rootdir", str(ROOT)]

    def _in_child(self, work: Any, limit_s: float) -> int | None:
        """The exit code of `work` in a forked child; None if it had to be ended."""
        pid = os.fork()
        if not pid:
            status = 70
            with contextlib.suppress(BaseException):
                os.setsid()
                target = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(target, 1)
                os.dup2(target, 2)
                for name in [name for name in sys.modules if name.split(".")[0] == "halfbyte"]:
                    del sys.modules[name]
                os.environ["PYTHONPATH"] = str(self.source)
                os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(WORK / "hypothesis")
                status = work()
            os._exit(status)
        ends = time.monotonic() + limit_s
        try:
            while time.monotonic() < ends:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    return os.waitstatus_to_exitcode(status)
                time.sleep(0.02)
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


# --------------------------------------------------------------------------------- the whole run


def default_files() -> list[str]:
    rooms = [path for room in ROOMS for path in sorted((ROOT / SOURCE / room).rglob("*.py"))]
    engine = [ROOT / SOURCE / "engine" / f"{name}.py" for name in ENGINE]
    found = [str(path.relative_to(ROOT)) for path in [*rooms, *engine]]
    return [path for path in found if not path.endswith("__init__.py") and tests_of(path)]


def without_tests() -> list[str]:
    """Files of the rooms that no test is named for, above or by its mirrored name."""
    known = set(default_files())
    every = [path for room in ROOMS for path in sorted((ROOT / SOURCE / room).rglob("*.py"))]
    names = [str(path.relative_to(ROOT)) for path in every if path.name != "__init__.py"]
    return [name for name in names if name not in known]


def tests_of(path: str) -> list[str]:
    room, _, name = str(Path(path).relative_to(SOURCE).with_suffix("")).partition("/")
    stem = name.split("/")[-1]
    shared = ("evals/test_asked.py", "evals/test_tasks.py") if name.startswith("tasks/") else ()
    mirrored = (f"{room}/test_{stem}.py", *shared, *MORE_TESTS.get(f"{room}/{name}", ()))
    return [f"tests/{test}" for test in mirrored if (ROOT / "tests" / test).is_file()]


def done_already() -> dict[tuple[str, str, int, str], dict[str, Any]]:
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    results = [json.loads(line) for line in lines]
    return {_key(result): result for result in results}


def _key(result: dict[str, Any]) -> tuple[str, str, int, str]:
    return result["path"], result["source"], result["start"], f"{result['was']}>{result['became']}"


def work_on(path: str, bench: Bench, arguments: argparse.Namespace) -> None:
    text = (ROOT / path).read_text()
    source = hashlib.sha256(text.encode()).hexdigest()[:12]
    possible = mutants_of(path, text)
    chosen = random.Random(f"{arguments.seed} {path}").sample(
        possible, min(arguments.sample, len(possible))
    )
    chosen.sort(key=lambda mutant: mutant.start)
    done = done_already()
    firsts: dict[tuple[str, str, int, str], str] = {}
    open_ones = []
    for mutant in chosen:
        before = done.get(_key({**asdict(mutant), "source": source}))
        lives = before is not None and before["verdict"] in ALIVE
        if before is None or (arguments.again and lives):
            open_ones.append(mutant)
            if before is not None:
                firsts[_key(before)] = before.get("first", "")
    if not open_ones:
        return
    covered = None
    if not arguments.again:
        covered = bench.measure(path, tests_of(path), arguments.test_seconds * 5)
        for test in covered.failing:
            print(f"{path}: {test} fails without a fault and is left out", flush=True)
    for mutant in open_ones:
        began = time.monotonic()
        tests, limit_s = tests_of(path), 20 * arguments.test_seconds
        if covered is not None:
            tests = _tests_for(mutant, covered, arguments.test_seconds)
            limit_s = 45 + 4 * sum(covered.seconds[test] for test in tests)
        verdict, by = bench.verdict(mutant, tests, limit_s) if tests else ("uncovered", "")
        if verdict == "time" and arguments.again:
            verdict = "survived"  # the tests as a whole were too long, not the fault's loop
        line = {
            **asdict(mutant),
            "source": source,
            "possible": len(possible),
            "verdict": verdict,
            "by": by,
            "tests": len(tests),
            "seconds": round(time.monotonic() - began, 1),
        }
        line["first"] = firsts.get(_key(line), verdict)
        with RESULTS.open("a") as results:
            results.write(json.dumps(line) + "\n")
        if verdict in ALIVE:
            print(
                f"{path}:{mutant.line}: {verdict}: {mutant.was!r} -> {mutant.became!r}", flush=True
            )


def _tests_for(mutant: Mutant, covered: Covered, most_seconds: float) -> list[str]:
    found: set[str] = set()
    for line in mutant.lines:
        found |= set(covered.tests_by_line.get(line, []))
    chosen: list[str] = []
    total = 0.0
    for test in sorted(found, key=lambda name: covered.seconds[name]):
        total += covered.seconds[test]
        if chosen and total > most_seconds:
            break
        chosen.append(test)
    return chosen


def report(files: Sequence[str]) -> dict[str, Any]:
    """Counts by file, and the survivors with their line, change and reason."""
    reasons = {
        (kept["path"], kept["code"], kept["became"]): kept for kept in json.loads(KEPT.read_text())
    }
    by_file: dict[str, dict[str, Any]] = {}
    survivors = []
    # What was said before any test was written for it, where that is known.
    tried: list[str] = []
    latest = done_already()
    for path in files:
        text = (ROOT / path).read_text()
        source = hashlib.sha256(text.encode()).hexdigest()[:12]
        results = [result for key, result in latest.items() if key[:2] == (path, source)]
        if not results:
            continue
        counts = collections.Counter(result["verdict"] for result in results)
        alive = [result for result in results if result["verdict"] in ALIVE]
        tried += [result["first"] for result in results if result.get("first")]
        kinds: collections.Counter[str] = collections.Counter()
        for result in sorted(alive, key=lambda result: result["start"]):
            code = text.splitlines()[result["line"] - 1].strip()
            kept = reasons.get((path, code, result["became"]), {})
            kind = kept.get("kind", "open")
            kinds[kind] += 1
            survivors.append(
                {
                    "where": f"{path}:{result['line']}",
                    "was": result["was"],
                    "became": result["became"],
                    "kind": kind,
                    "reason": kept.get("reason", "not looked at"),
                }
            )
        by_file[path] = {
            "possible": results[0]["possible"],
            "run": len(results),
            "killed": counts["killed"] + counts["time"],
            "of_these_by_time": counts["time"],
            **{kind: kinds[kind] for kind in ("equivalent", "cosmetic", "hardware", "open")},
        }
    rooms: dict[str, Any] = {}
    for room in sorted({path.split("/")[2] for path in by_file}):
        own = [counts for path, counts in by_file.items() if path.split("/")[2] == room]
        rooms[room] = _share(own)
    noticed = sum(first not in ALIVE for first in tried)
    return {
        "all": _share(list(by_file.values())),
        "at_first_try": {
            "run": len(tried),
            "killed": noticed,
            "killed_percent": round(100 * noticed / max(1, len(tried)), 1),
        },
        "rooms": rooms,
        "files": by_file,
        "survivors": survivors,
    }


def _share(counts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    run = sum(count["run"] for count in counts)
    killed = sum(count["killed"] for count in counts)
    equivalent = sum(count["equivalent"] for count in counts)
    return {
        "run": run,
        "killed": killed,
        "equivalent": equivalent,
        "killed_percent_after_equivalent": round(100 * killed / max(1, run - equivalent), 1),
    }


def mutant_figures(results: dict[str, Any]) -> list[Figure]:
    """The share that a test notices of those that change what the program does."""
    rows = {"all rooms": results["all"], **results["rooms"]}
    return [
        Figure("small faults that a test notices", row["killed_percent_after_equivalent"], "%",
               "tests", {"in": room, "of": row["run"] - row["equivalent"]})
        for room, row in rows.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Put small faults into the source, run tests.")
    parser.add_argument("files", nargs="*", help="source files; default: the rooms of the record")
    parser.add_argument("--sample", type=int, default=20, help="mutants of each file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    parser.add_argument("--test-seconds", type=float, default=30, help="of tests for each mutant")
    parser.add_argument(
        "--again", action="store_true", help="try survivors again, with all tests of their file"
    )
    parser.add_argument("--write", action="store_true", help=f"write {RECORD.name}")
    parser.add_argument("--report", action="store_true", help="run nothing, report what is known")
    parser.add_argument("--note", default="", help="what a reader of the record should know")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    WORK.mkdir(parents=True, exist_ok=True)
    files = arguments.files or default_files()
    if not arguments.report:
        for name in HEAVY:
            importlib.import_module(name)
        workers = []
        for number in range(arguments.jobs):
            pid = os.fork()
            if not pid:
                bench = Bench(os.getpid())
                try:
                    for path in files[number :: arguments.jobs]:
                        work_on(path, bench, arguments)
                finally:
                    shutil.rmtree(bench.source, ignore_errors=True)
                os._exit(0)
            workers.append(pid)
        for pid in workers:
            os.waitpid(pid, 0)
    results = report(files)
    for survivor in results["survivors"]:
        print(
            f"{survivor['where']}: {survivor['was']!r} -> {survivor['became']!r}: "
            f"{survivor['kind']}"
        )
    print(json.dumps({"all": results["all"], "rooms": results["rooms"]}, indent=1))
    if arguments.write:
        record.write(
            RECORD,
            name="mutants",
            question="how many small faults in the source make a test fail?",
            command=f"make mutants SAMPLE={arguments.sample}",
            figures=mutant_figures(results),
            results={
                "seed": arguments.seed,
                "note": arguments.note,
                "without_tests_of_their_own": without_tests(),
                **results,
            },
        )


if __name__ == "__main__":
    main()
