"""The process that tries grammars: what kills it costs its own request only."""

import contextlib
import gc
import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from halfbyte import processes
from halfbyte.chat.grammar import GrammarCompiler
from halfbyte.chat.grammar_limits import GrammarLimits
from halfbyte.chat.grammar_masks import Mask
from halfbyte.chat.grammar_texts import choice_grammar, json_schema_grammar, regex_grammar
from halfbyte.chat.mistral_format import MistralFormat
from halfbyte.errors import RequestError


@pytest.fixture(scope="module")
def compiler(mistral: MistralFormat) -> GrammarCompiler:
    return GrammarCompiler(mistral.vocabulary)


def chain(count: int, shape: str) -> str:
    defs: dict[str, Any] = {f"a{count}": {"type": "string"}}
    for i in range(count):
        ref = {"$ref": f"#/$defs/a{i + 1}"}
        defs[f"a{i}"] = {
            "object": {"type": "object", "properties": {"x": ref}, "required": ["x"]},
            "bare": ref,
            "array": {"type": "array", "items": ref},
        }[shape]
    return json_schema_grammar({"$ref": "#/$defs/a0", "$defs": defs}, lenient=True)


def rules(count: int) -> str:
    lines = [f'r{i}: "a" r{i + 1} | r{i + 1}' for i in range(count)]
    return "\n".join(["start: r0", *lines, f'r{count}: "b"', ""])


@pytest.mark.parametrize(
    "lark", [chain(1000, "object"), chain(3000, "bare"), chain(3500, "array"), rules(4000)],
    ids=["objects", "references", "arrays", "rules"],
)  # fmt: skip
def test_what_overflows_a_stack_is_a_400(compiler: GrammarCompiler, lark: str) -> None:
    with pytest.raises(RequestError, match="p: it takes more than") as caught:
        compiler.compile(lark, "p", is_free=True)
    assert (caught.value.status, caught.value.code) == (400, "schema_too_complex")
    compiler.compile(choice_grammar(["a"]), "p")


def test_chains_that_people_write_are_compiled(compiler: GrammarCompiler) -> None:
    compiler.compile(chain(200, "object"), "p")
    compiler.compile(rules(100), "p", is_free=True)


def resident_mb() -> float:
    with open("/proc/self/statm") as figures:
        return int(figures.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.timeout(120)
def test_bombs_leave_nothing_in_the_server(compiler: GrammarCompiler) -> None:
    compiler.compile(choice_grammar(["a"]), "p")
    before = resident_mb()
    source = "((a{990}){1000}){1000}"
    schema = {"type": "string", "pattern": f"^{source}$"}
    for lark in (regex_grammar(source), json_schema_grammar(schema, lenient=False)):
        with pytest.raises(RequestError):
            compiler.compile(lark, "p")
    assert resident_mb() - before < 20
    assert len(compiler._passed) <= 4


def test_a_failure_is_not_kept(mistral: MistralFormat) -> None:
    compiler = GrammarCompiler(mistral.vocabulary)
    for _ in range(2):
        with pytest.raises(RequestError):
            compiler.compile(regex_grammar("(?=x)"), "p")
    assert not compiler._passed


def test_the_cache_is_bounded_by_bytes(mistral: MistralFormat) -> None:
    limits = GrammarLimits(cache_bytes=1_000_000, passed_chars=10_000)
    compiler = GrammarCompiler(mistral.vocabulary, limits)
    for number in range(30):
        schema = {"enum": [f"{number} {value}" for value in range(100)]}
        checked = compiler.compile(json_schema_grammar(schema, lenient=False), "p")
        compiler.mask(checked)
    kept = list(compiler.masks._cache.values())
    assert 1 < len(kept) < 30
    assert sum(grammar.num_bytes for grammar in kept) <= 1_000_000
    # The last one is there.
    assert compiler.mask(checked)._grammar is kept[-1]
    passed = list(compiler._passed.values())
    assert 1 < len(passed) < 30 and passed[-1] == checked
    assert sum(len(grammar.lark) for grammar in passed) <= 10_000


def test_running_answers_leave_no_room_without_end(mistral: MistralFormat) -> None:
    compiler = GrammarCompiler(mistral.vocabulary, GrammarLimits(total_bytes=1_500_000))
    masks: list[Mask] = []

    def lark() -> str:
        values = [f"{len(masks)} {value}" for value in range(200)]
        return json_schema_grammar({"enum": values}, lenient=False)

    def fill() -> None:
        while len(masks) < 30:
            masks.append(compiler.mask(compiler.compile(lark(), "p")))

    with pytest.raises(RequestError, match="running answers take") as caught:
        fill()
    assert (caught.value.status, caught.value.code) == (429, "grammars_full")
    assert len(masks) > 1
    masks.clear()
    gc.collect()
    compiler.mask(compiler.compile(lark(), "p"))


def test_a_schema_too_large_when_compiled_is_a_400(mistral: MistralFormat) -> None:
    compiler = GrammarCompiler(mistral.vocabulary, GrammarLimits(max_bytes=500_000))
    schema = {"enum": [f"value {value}" for value in range(3000)]}
    with pytest.raises(RequestError, match="compiled it takes"):
        compiler.compile(json_schema_grammar(schema, lenient=False), "p")


def test_processor_time_is_bounded(mistral: MistralFormat) -> None:
    limits = GrammarLimits(trial_cpu_s=0.2, lexer_fuel=10**9)
    compiler = GrammarCompiler(mistral.vocabulary, limits)
    with pytest.raises(RequestError, match=r"0\.2 s"):
        compiler.compile(regex_grammar("((a{990}){1000}){1000}"), "p")


def test_memory_is_bounded(mistral: MistralFormat) -> None:
    limits = GrammarLimits(trial_bytes=32_000_000, lexer_fuel=10**9, trial_cpu_s=30)
    compiler = GrammarCompiler(mistral.vocabulary, limits)
    with pytest.raises(RequestError, match="32 MB"):
        compiler.compile(regex_grammar("((a{990}){1000}){1000}"), "p")


def children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


def test_a_process_that_is_killed_is_replaced(mistral: MistralFormat) -> None:
    compiler = GrammarCompiler(mistral.vocabulary)
    compiler.compile(choice_grammar(["a"]), "p")
    process = compiler._trials._process
    assert process is not None
    for child in children(process.pid):
        with contextlib.suppress(ProcessLookupError):  # one may have ended by itself
            os.kill(child, signal.SIGKILL)
    compiler.compile(choice_grammar(["b"]), "p")
    process.kill()
    process.wait()
    compiler.compile(choice_grammar(["c"]), "p")
    assert compiler._trials._process is not process


def test_the_process_leaves_with_its_compiler(mistral: MistralFormat) -> None:
    compiler = GrammarCompiler(mistral.vocabulary)
    compiler.compile(choice_grammar(["a"]), "p")
    process = compiler._trials._process
    assert process is not None
    pids = [process.pid, *children(process.pid)]
    del compiler
    gc.collect()
    assert process.poll() == 0
    deadline = time.monotonic() + 5
    while any(os.path.exists(f"/proc/{pid}") for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_many_at_once(compiler: GrammarCompiler) -> None:
    """Good and bad ones, from threads, and each gets its own answer."""
    wrong: list[str] = []

    def ask(number: int) -> None:
        bad = number % 3 == 0
        lark = chain(1500, "object") if bad else choice_grammar([f"{number}", "x"])
        lark = lark.replace("a1500", f"b{number}x1500") if bad else lark
        try:
            compiler.compile(lark, "p")
            outcome = False
        except RequestError:
            outcome = True
        if outcome is not bad:
            wrong.append(f"{number}: {outcome}")

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_messages_are_whole_sentences(compiler: GrammarCompiler) -> None:
    for lark, words in (
        (
            json_schema_grammar({"type": "string", "pattern": "^(?!a)"}, lenient=False),
            "look-around",
        ),
        (regex_grammar("(?=x)"), "look-around"),
        ("start: %json " + json.dumps({"$ref": "#/x"}) + "\n", "does not exist"),
        (json_schema_grammar({"allOf": [{"$ref": "#"}]}, lenient=False), "no text fits it"),
    ):
        with pytest.raises(RequestError, match=words) as caught:
            compiler.compile(lark, "p")
        assert not str(caught.value).endswith(":") and "\n" not in str(caught.value)


def test_a_slow_start_costs_no_request_its_time(
    mistral: MistralFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the process has been ended and is started anew."""
    start = processes.start

    def slowly(module: str, *given: Any, **options: Any) -> Any:
        (tmp_path / "slow.py").write_text(
            f"import time\nfrom {module} import main as quickly\n"
            "def main():\n    time.sleep(1.5)\n    quickly()\n"
        )
        return start("slow", *given, **options)

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(processes, "start", slowly)
    compiler = GrammarCompiler(mistral.vocabulary)
    compiler.compile(choice_grammar(["a"]), "p", timeout_s=1.0)
    process = compiler._trials._process
    assert process is not None
    process.kill()
    process.wait()
    compiler.compile(choice_grammar(["b"]), "p", timeout_s=1.0)


def test_a_process_that_cannot_start_is_said(
    mistral: MistralFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = processes.start
    monkeypatch.setattr(
        processes, "start", lambda _, *given, **options: start("sys", *given, **options)
    )
    compiler = GrammarCompiler(mistral.vocabulary)
    with pytest.raises(RequestError, match="cannot be tried just now") as caught:
        compiler.compile(choice_grammar(["a"]), "p")
    assert caught.value.status == 503
