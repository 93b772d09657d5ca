"""Runs against a scripted server: what is asked, what is recorded, what faults and kills do."""

import gc
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("inspect_ai", reason="extra 'eval' is not installed")

from inspect_ai.model._providers.openai_compatible import OpenAICompatibleAPI

import halfbyte
from evals_stub import Reply, completion, refusal, serving
from halfbyte.checkpoint.identity import checkpoint_identity
from halfbyte.cli.main import main
from halfbyte.errors import UsageError
from halfbyte.evals.records import lock_run, read_attempts, read_records, read_run
from halfbyte.evals.running.ask import max_tokens_for
from halfbyte.evals.running.run import records_of_log
from halfbyte.evals.types import Text
from halfbyte.model.tiny import write_tiny_checkpoint

# Both are inspect-ai's affair: a deprecated argument, and one stream per sample left to the
# collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'initial' parameter:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

DATA = Path(__file__).parents[1] / "data" / "evals"


@pytest.fixture(autouse=True)
def _collect_while_its_warnings_are_filtered() -> Iterator[None]:
    yield
    gc.collect()


def quick_answers() -> dict[str, str]:
    """Question text -> the right answer's text, so that the stub can know everything."""
    from halfbyte.evals.tasks.benchmark import Options
    from halfbyte.evals.tasks.quick import load

    return {
        s.fields["question"]: (
            f"Answer: {s.gold}" if "options" in s.fields else f"\\boxed{{{s.gold}}}"
        )
        for s in load(Options()).samples
    }


ANSWERS = quick_answers()


def question_of(request: dict[str, Any]) -> str:
    text = request["messages"][0]["content"]
    return next(question for question in ANSWERS if question in text)


def all_right(request: dict[str, Any]) -> Reply:
    return completion(ANSWERS[question_of(request)], reasoning="of course")


def evaluate(url: str, out: Path, *more: str) -> int:
    return main(["evaluate", url, "--suite", "quick", "--out", str(out), *more])


def test_every_attempt_has_its_own_seed_and_both_arms_the_same(tmp_path: Path) -> None:
    seeds = []
    for arm in ("fp8", "mixed"):
        with serving(all_right) as stub:
            flags = ("--arm", arm, "--repeats", "2", "--limit", "12")
            assert evaluate(stub.url, tmp_path / arm, *flags) == 0
        sent = {(question_of(r), r["seed"]) for r in stub.requests}
        assert len(stub.requests) == 24
        assert len({seed for _, seed in sent}) == 24
        seeds.append(sent)
        request = stub.requests[0]
        assert (request["temperature"], request["top_p"]) == (0.7, 0.95)
        assert (request["reasoning_effort"], request["max_tokens"]) == ("high", 65_536)
        assert [m["role"] for m in request["messages"]] == ["user"]
    assert seeds[0] == seeds[1]


def test_a_shifted_run_draws_anew_and_compares_with_its_own_model(tmp_path: Path) -> None:
    sent = []
    for name, shift in (("b", "0"), ("again", "1")):
        with serving(all_right) as stub:
            command = ("--limit", "4", "--seed-shift", shift)
            assert evaluate(stub.url, tmp_path / name, *command) == 0
            # A folder's run goes on with its own seeds only.
            assert evaluate(stub.url, tmp_path / name, "--limit", "4", "--seed-shift", "2") == 2
        sent.append({r["seed"] for r in stub.requests})
    assert len(sent[0]) == len(sent[1]) == 4 and not sent[0] & sent[1]
    assert main(["compare-evals", str(tmp_path / "b"), str(tmp_path / "again")]) == 3


def test_record_holds_what_was_run_and_the_log_holds_the_same_records(tmp_path: Path) -> None:
    with serving(all_right) as stub:
        assert evaluate(stub.url, tmp_path, "--limit", "10") == 0
    run = read_run(tmp_path)
    result = run.benchmarks["quick"]
    assert (result.status, result.score, result.items) == ("complete", 1.0, 10)
    assert result.low is not None and result.low < 0.8  # ten right answers prove little
    assert run.settings["temperature"] == 0.7
    assert run.packages["inspect-ai"]
    records = list(read_records(tmp_path / "quick" / "samples.jsonl"))
    assert {r.reasoning for r in records} == {"of course"}
    (log,) = (tmp_path / "quick" / "inspect").glob("*.eval")
    by_key = {(r.item_id, r.repeat): r for r in records_of_log(log)}
    assert by_key == {(r.item_id, r.repeat): r for r in records}


@pytest.mark.parametrize("limit", [1, 3])
def test_connections_to_the_server_are_closed_when_all_is_graded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    closed = []

    async def spy(self: Any) -> None:
        closed.append(len(stub.requests))
        await close(self)

    close = OpenAICompatibleAPI.aclose
    monkeypatch.setattr(OpenAICompatibleAPI, "aclose", spy)
    with serving(all_right) as stub:
        assert evaluate(stub.url, tmp_path, "--limit", str(limit), "--concurrency", "1") == 0
    assert closed == [0, limit]  # of the start-up check, of the run


def test_what_the_server_will_refuse_is_said_of_all_benchmarks_before_anything_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Effort, temperature, pictures: the folder is not burnt by settings that cannot be."""

    def strict(request: dict[str, Any]) -> Reply:
        if request.get("temperature") == 0.7:
            return refusal(400, "temperature: 0.5 at most")
        return completion("A")

    with serving(all_right, tried=strict) as stub:
        both = ["--suite", "quick", "mmlu_pro", "--data", str(DATA), "--out", str(tmp_path)]
        assert main(["evaluate", stub.url, *both, "--limit", "5"]) == 2
        said = capsys.readouterr().err
        assert "nothing was asked" in said and said.count("temperature: 0.5 at most") == 2
        assert not stub.requests and len(stub.tried) == 4
        assert not (tmp_path / "run.json").exists()
        assert evaluate(stub.url, tmp_path, "--limit", "5", "--temperature", "0.2") == 0
        tried = len(stub.tried)
        assert evaluate(stub.url, tmp_path, "--limit", "5", "--temperature", "0.2") == 0
        assert len(stub.tried) == tried == 5  # once, not when a run goes on
    asked, of_run = stub.tried[-1], stub.requests[0]
    same = ("temperature", "top_p", "model", "reasoning_effort")
    assert [asked.get(name) for name in same] == [of_run.get(name) for name in same]


def test_one_item_that_is_refused_does_not_keep_a_run_from_beginning(tmp_path: Path) -> None:
    refused: list[str] = []

    def first_only(request: dict[str, Any]) -> Reply:
        question = question_of(request)
        refused.extend([question] if not refused else [])
        return refusal(400, "too long") if question in refused else completion("A")

    with serving(all_right, tried=first_only) as stub:
        assert evaluate(stub.url, tmp_path, "--limit", "5") == 0
        assert len(stub.tried) == 2
    with serving(all_right, tried=lambda _: refusal(503, "starting")) as stub:
        assert evaluate(stub.url, tmp_path / "busy", "--limit", "5") == 0


def test_a_finished_run_asks_nothing_again(tmp_path: Path) -> None:
    with serving(all_right) as stub:
        evaluate(stub.url, tmp_path, "--limit", "5")
        assert evaluate(stub.url, tmp_path, "--limit", "5") == 0
        assert len(stub.requests) == 5


def test_resuming_with_other_items_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data" / "mmlu_pro"
    folder.mkdir(parents=True)
    row = {"question_id": 1, "question": "one?", "options": ["x", "y"], "answer": "A",
           "category": "math"}  # fmt: skip
    (folder / "items.jsonl").write_text(json.dumps(row) + "\n")
    out = tmp_path / "run"
    with serving(lambda request: completion("Answer: A")) as stub:
        command = ["evaluate", stub.url, "--suite", "mmlu_pro", "--data", str(tmp_path / "data")]
        assert main([*command, "--out", str(out)]) == 0
        # As after a kill: answers are there, the benchmark's result is not.
        run = json.loads((out / "run.json").read_text())
        (out / "run.json").write_text(json.dumps({**run, "benchmarks": {}}))
        (folder / "items.jsonl").write_text(json.dumps({**row, "question": "two?"}) + "\n")
        assert main([*command, "--out", str(out)]) == 2
        assert "rendered requests differ" in capsys.readouterr().err
        assert len(stub.requests) == 1


def test_other_settings_are_not_mixed_into_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(all_right) as stub:
        evaluate(stub.url, tmp_path, "--limit", "5")
        assert evaluate(stub.url, tmp_path, "--limit", "5", "--temperature", "0") == 2
    assert "temperature" in capsys.readouterr().err
    assert len(stub.requests) == 5


def test_no_server_is_started_for_a_run_that_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: object) -> None:
        raise AssertionError("a server was started")

    with serving(all_right) as stub:
        evaluate(stub.url, tmp_path, "--limit", "5")
    monkeypatch.setattr("halfbyte.evals.running.endpoint.serve", refused)
    (tmp_path / "weights").mkdir()
    weights = str(tmp_path / "weights")
    assert evaluate(weights, tmp_path, "--limit", "5", "--temperature", "0") == 2
    assert "temperature" in capsys.readouterr().err
    data = ["--suite", "aime2025", "--data", weights, "--out", str(tmp_path / "new")]
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert main(["evaluate", weights, *data]) == 2
    assert "AIME" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_causes_are_told_apart_and_only_faults_are_missing(tmp_path: Path) -> None:
    kinds = dict(zip(ANSWERS, range(len(ANSWERS)), strict=True))

    def script(request: dict[str, Any]) -> Reply:
        kind = kinds[question_of(request)] % 8
        right = ANSWERS[question_of(request)]
        return {
            0: completion(right),
            1: completion("Answer: Z \\boxed{-1}"),
            2: completion("I would not know."),
            3: completion(""),
            4: completion(right, finish_reason="length"),
            5: completion(f"<think>{right}"),
            6: refusal(400, "prompt too long", "context_length_exceeded"),
            7: completion(f"<think>{right}</think> I would rather not say."),
        }[kind]

    with serving(script) as stub:
        assert evaluate(stub.url, tmp_path) == 0
    result = read_run(tmp_path).benchmarks["quick"]
    counted = Counter(result.causes)
    assert sum(counted.values()) == 40
    assert (counted["ok"], counted["length"], counted["refused"]) == (5, 5, 5)
    assert counted["empty"] == 10  # nothing, or only unfinished reasoning
    assert counted["wrong"] + counted["unparsed"] == 15
    # All of them stay in the denominator.
    assert result.score == pytest.approx(5 / 40)
    assert result.metrics["length_share"] == pytest.approx(5 / 40)


def test_faults_of_the_server_are_retried_then_listed_and_never_scored(tmp_path: Path) -> None:
    failing, flaky = list(ANSWERS)[:2]
    asked: Counter[str] = Counter()

    def script(request: dict[str, Any]) -> Reply:
        question = question_of(request)
        asked[question] += 1
        if question == failing or (question == flaky and asked[question] < 2):
            return refusal(503, "overloaded")
        return all_right(request)

    with serving(script) as stub:
        assert evaluate(stub.url, tmp_path, "--retries", "1") == 1
        result = read_run(tmp_path).benchmarks["quick"]
        assert (result.status, result.score) == ("incomplete", None)
        assert asked[failing] == asked[flaky] == 2
        assert [row[:2] for row in result.missing] == [["quick-01", 0]]
        assert result.metrics["retried_attempts"] == 2
        # Asked for in so many words, the score is that of what is there.
        assert evaluate(stub.url, tmp_path, "--retries", "0", "--partial") == 0
        assert read_run(tmp_path).benchmarks["quick"].score == 1.0
    # The server recovers: the missing attempt alone is asked again.
    with serving(all_right) as stub:
        assert evaluate(stub.url, tmp_path) == 0
        assert len(stub.requests) == 1
    assert read_run(tmp_path).benchmarks["quick"].status == "complete"


def test_a_wrong_key_stops_the_run_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(lambda request: refusal(401, "no such key")) as stub:
        assert evaluate(stub.url, tmp_path, "--concurrency", "4", "--repeats", "5") == 2
        assert len(stub.requests) < 20
    assert "401" in capsys.readouterr().err


def test_output_limit_leaves_room_for_the_prompt(tmp_path: Path) -> None:
    with serving(all_right, context_tokens=2048) as stub:
        evaluate(stub.url, tmp_path, "--limit", "5")
    assert all(1500 < request["max_tokens"] < 2048 - 256 for request in stub.requests)
    stored = {a.max_tokens for a in read_attempts(tmp_path / "quick" / "attempts.jsonl")}
    assert stored == {request["max_tokens"] for request in stub.requests}


def test_a_long_prompt_keeps_a_useful_output_limit() -> None:
    """Text of the length of AA-LCR's longest prompt in the context that the set is served with."""
    prose = "In March the committee found, as the third table shows, that costs rose by 4.5%. "
    words = (prose * 7000)[:548_000]
    limit = max_tokens_for((Text(words),), 65_536, 196_608)
    assert 20_000 < limit < 65_536
    assert max_tokens_for((Text("数" * 1000),), 65_536, 4_096) < 4_096 - 1000 - 100
    assert max_tokens_for((Text("short"),), 65_536, None) == 65_536


# Where inspect-ai finds another provider's client, loading that takes most of a start.
_RUN = """
import sys
sys.modules["anthropic"] = None
from halfbyte.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.timeout(180)  # each start imports inspect-ai: over ten seconds on a busy machine
@pytest.mark.parametrize(
    ("moments", "items"),
    [((15,), 14), pytest.param((3, 20, 60), 40, marks=pytest.mark.slow)],
)
def test_kill_at_any_moment_repeats_at_most_the_attempts_in_flight(
    tmp_path: Path, moments: tuple[int, ...], items: int
) -> None:
    concurrency = 8
    command = [
        sys.executable, "-c", _RUN, "evaluate", "URL", "--suite", "quick", "--repeats", "3",
        "--limit", str(items), "--concurrency", str(concurrency), "--out", str(tmp_path),
    ]  # fmt: skip
    journal = tmp_path / "quick" / "attempts.jsonl"
    with serving(all_right, delay_s=0.05) as stub:
        command[4] = stub.url
        kills = 0
        for wanted in moments:
            child = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
            while child.poll() is None:
                if journal.exists() and journal.read_bytes().count(b"\n") >= wanted:
                    os.killpg(child.pid, signal.SIGKILL)
                    child.wait()
                    kills += 1
                time.sleep(0.01)
        assert kills == len(moments)
        # A torn line, as a crash of the machine would leave it.
        with journal.open("ab") as file:
            file.write(b'{"item_id": "quick-')
        done = subprocess.run(command, stderr=subprocess.DEVNULL, check=False)
    assert done.returncode == 0
    assert read_run(tmp_path).benchmarks["quick"].causes == {"ok": 3 * items}
    assert len(stub.requests) <= 3 * items + kills * concurrency
    attempts = Counter((a.item_id, a.repeat) for a in read_attempts(journal))
    assert set(attempts.values()) == {1}


def test_regrading_needs_no_server_and_keeps_the_old_grades(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(all_right) as stub:
        evaluate(stub.url, tmp_path)
    before = (tmp_path / "quick" / "samples.jsonl").read_bytes()
    assert main(["grade", str(tmp_path)]) == 0
    assert "0 grades changed" in capsys.readouterr().out
    # A rule changes: letters are no longer accepted.
    monkeypatch.setattr("halfbyte.evals.grading.letters.extract_letter", lambda *_: None)
    assert main(["grade", str(tmp_path)]) == 0
    assert "20 grades changed" in capsys.readouterr().out
    assert (tmp_path / "quick" / "samples.jsonl").read_bytes() == before
    assert read_run(tmp_path).benchmarks["quick"].score == 0.5
    assert read_run(tmp_path / "run.json").benchmarks["quick"].score == 1.0


def test_answers_of_a_judged_benchmark_are_judged_and_judgements_stored(tmp_path: Path) -> None:
    lcr = tmp_path / "data" / "aa_lcr"
    lcr.mkdir(parents=True)
    rows = [
        {"question": f"q{i}?", "answer": f"a{i}", "context": f"BEGIN DOCUMENT 1:\nset {i // 2}"}
        for i in range(6)
    ]
    (lcr / "documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # The first is of the start-up check.
    replies = ["CORRECT", "CORRECT", "INCORRECT", "hm", "hm", "hm", *["CORRECT"] * 4]
    verdicts = iter(replies)
    with (
        serving(lambda request: completion("my answer")) as model,
        serving(lambda request: completion(next(verdicts))) as judge,
    ):
        arguments = [
            "evaluate", model.url, "--suite", "aa_lcr", "--data", str(tmp_path / "data"),
            "--repeats", "1", "--out", str(tmp_path / "run"), "--concurrency", "1",
        ]  # fmt: skip
        assert main(arguments) == 2  # without a judge nothing is asked
        assert not model.requests
        arguments += ["--judge", judge.url, "--judge-model", "stub", "--judge-revision", "r1"]
        # One verdict stays unreadable after being asked once more: ungraded, hence incomplete.
        assert main(arguments) == 1
        result = read_run(tmp_path / "run").benchmarks["aa_lcr"]
        assert result.causes["ungraded"] == 1
        assert result.score is None
        assert judge.requests[0]["temperature"] == 0.0
        # Resuming asks the judge again, not the model.
        assert len(model.requests) == 6
        assert main([*arguments, "--judge-revision", "r2"]) == 2  # two judges in one run: no
        assert main(arguments) == 0
        assert len(model.requests) == 6
    run = read_run(tmp_path / "run")
    assert run.judge is not None and run.judge["revision"] == "r1"
    assert run.benchmarks["aa_lcr"].groups == 3
    assert run.benchmarks["aa_lcr"].score == pytest.approx(5 / 6)
    records = list(read_records(tmp_path / "run" / "aa_lcr" / "samples.jsonl"))
    assert records[0].details["judgement"] == "CORRECT"
    assert main(["grade", str(tmp_path / "run"), "--data", str(tmp_path / "data")]) == 0
    assert read_run(tmp_path / "run").benchmarks["aa_lcr"].score == pytest.approx(5 / 6)


def test_a_judge_that_cannot_judge_is_said_before_the_model_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lcr = tmp_path / "data" / "aa_lcr"
    lcr.mkdir(parents=True)
    row = {"question": "q?", "answer": "a", "context": "BEGIN DOCUMENT 1:\nset"}
    (lcr / "documents.jsonl").write_text(json.dumps(row) + "\n")
    with (
        serving(lambda request: completion("my answer")) as model,
        serving(lambda request: completion("I would rather not say")) as mute,
        serving(lambda request: refusal(401, "no such key")) as locked,
    ):
        with socket.create_server(("127.0.0.1", 0)) as nobody:
            absent = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        for judge, said in ((mute.url, "rather not"), (locked.url, "no such key"), (absent, "")):
            out = tmp_path / "run"
            arguments = [
                "evaluate", model.url, "--suite", "aa_lcr", "--data", str(tmp_path / "data"),
                "--repeats", "1", "--out", str(out), "--judge", judge, "--judge-model", "stub",
            ]  # fmt: skip
            assert main(arguments) == 2
            told = capsys.readouterr().err
            assert judge in told
            assert said in told
            assert not (out / "run.json").exists()
            assert not model.requests


def test_code_steps_see_their_own_repeat_and_are_run(tmp_path: Path) -> None:
    pytest.importorskip("h5py", reason="the interpreter of generated code needs h5py")
    from halfbyte.errors import UnsupportedError
    from halfbyte.evals.sandbox import isolation

    try:
        isolation()
    except UnsupportedError as reason:
        pytest.skip(f"no sandbox on this machine: {reason}")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "scicode").symlink_to(DATA / "scicode")
    problems = (DATA / "scicode" / "problems_dev_subset.jsonl").read_text().splitlines()
    steps = [step for p in map(json.loads, problems) for step in p["sub_steps"]]

    def script(request: dict[str, Any]) -> Reply:
        text = request["messages"][0]["content"]
        step = next(s for s in steps if s["function_header"] in text.split("NEXT STEP:")[1])
        code = f"# seed {request['seed']}\n{step['ground_truth_code']}"
        return completion(f"```python\nimport os\n{code}\n```")

    with serving(script) as stub:
        status = main(
            ["evaluate", stub.url, "--suite", "scicode", "--data", str(tmp_path / "data"),
             "--repeats", "2", "--limit", "2", "--out", str(tmp_path / "run"),
             "--code-python", sys.executable, "--code-wall-s", "30"]
        )  # fmt: skip
    assert status == 0
    result = read_run(tmp_path / "run").benchmarks["scicode"]
    assert result.score == 1.0
    assert result.metrics["main_problem_accuracy"] == 1.0
    seeds = {a.seed: (a.item_id, a.repeat) for a in read_attempts(
        tmp_path / "run" / "scicode" / "attempts.jsonl")}  # fmt: skip
    for request in stub.requests:
        earlier = request["messages"][0]["content"].split("NEXT STEP:")[0]
        own = seeds[request["seed"]]
        mentioned = {seeds[s] for s in seeds if f"# seed {s}\n" in earlier}
        assert all(repeat == own[1] for _, repeat in mentioned)


def step_answers(request: dict[str, Any]) -> Reply:
    """The gold code of the step that a request asks for."""
    problems = (DATA / "scicode" / "problems_dev_subset.jsonl").read_text().splitlines()
    steps = [step for p in map(json.loads, problems) for step in p["sub_steps"]]
    text = request["messages"][0]["content"].split("NEXT STEP:")[1]
    step = next(s for s in steps if s["function_header"] in text)
    return completion(f"```python\n{step['ground_truth_code']}\n```")


def test_a_grader_that_fails_is_recorded_with_its_reason_and_graded_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("h5py", reason="the interpreter of generated code needs h5py")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "scicode").symlink_to(DATA / "scicode")
    # As people give it: relative, and over the link of a virtual environment.
    (tmp_path / "code").symlink_to(Path(sys.prefix))
    monkeypatch.chdir(tmp_path)
    command = ["--suite", "scicode", "--data", "data", "--repeats", "1", "--limit", "1", "--out",
               "run", "--code-wall-s", "30"]  # fmt: skip
    relative = ["--code-python", f"code/bin/{Path(sys.executable).name}"]
    with serving(step_answers) as stub:
        # A wrong path is said before anything is asked.
        wrong = ["--code-python", "nowhere/bin/python"]
        assert main(["evaluate", stub.url, *command, *wrong]) == 2
        assert "nowhere/bin/python is not a Python" in capsys.readouterr().err
        assert not stub.requests
        with monkeypatch.context() as broken:
            broken.setattr(
                "halfbyte.evals.score.run_program", lambda *_, **__: (1 / 0 if True else None)
            )
            assert main(["evaluate", stub.url, *command, *relative]) == 1
        result = read_run(tmp_path / "run").benchmarks["scicode"]
        asked = len(stub.requests)
        assert result.causes == {"ungraded": asked}
        assert all("ZeroDivisionError" in why for _, _, why in result.missing)
        assert "ZeroDivisionError" in result.reason
        assert "ZeroDivisionError" in capsys.readouterr().out
        # The answers are there: only the grades are made up for.
        assert main(["evaluate", stub.url, *command, *relative]) == 0
        assert len(stub.requests) == asked
    assert read_run(tmp_path / "run").benchmarks["scicode"].score == 1.0


def test_algebra_that_is_missing_is_said_before_anything_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from halfbyte.evals.grading import numbers

    (tmp_path / "math_verify.py").write_text("raise ImportError('no such package')")
    source = str(Path(numbers.__file__).parents[3])
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{source}")
    numbers.equals_in_child.cache_clear()
    with serving(all_right) as stub:
        assert evaluate(stub.url, tmp_path / "run", "--limit", "2") == 2
        assert not stub.requests
    assert "needs math-verify" in capsys.readouterr().err
    numbers.equals_in_child.cache_clear()


def as_parts(content: Any) -> Reply:
    status, body = completion("")
    body["choices"][0]["message"]["content"] = content
    return status, body


THOUGHT = {"type": "thinking", "thinking": [{"type": "text", "text": "of course"}]}
MESSAGES = {
    "parts": lambda right: as_parts([THOUGHT, {"type": "text", "text": right}]),
    "split text": lambda right: as_parts([{"type": "text", "text": c} for c in right]),
    "quoted mark": lambda right: completion(f"The <think> tag.\n{right}", reasoning="of course"),
    "inline block": lambda right: completion(f"<think>of course</think>{right}"),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_answers_are_read_in_every_form_of_message(tmp_path: Path, name: str) -> None:
    with serving(lambda request: MESSAGES[name](ANSWERS[question_of(request)])) as stub:
        assert evaluate(stub.url, tmp_path, "--limit", "4", "--retries", "0") == 0
    assert read_run(tmp_path).benchmarks["quick"].causes == {"ok": 4}
    reasoning = {a.reasoning for a in read_attempts(tmp_path / "quick" / "attempts.jsonl")}
    assert reasoning == ({""} if name == "split text" else {"of course"})


FAULTS: dict[str, tuple[Reply, str]] = {
    "error body": ((200, {"error": {"message": "out of coins", "code": 502}}), "out of coins"),
    "error text": ((200, {"error": "out of coins"}), "out of coins"),
    "no choices": ((200, {"choices": [], "object": "chat.completion"}), "no choices"),
    "null choices": ((200, {"choices": None, "detail": "busy"}), "busy"),
    "no message": ((200, {"choices": [{"index": 0}]}), "without a message"),
    "nothing": ((200, {}), "no choices"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_an_error_with_status_200_is_a_fault_of_the_server_in_its_own_words(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    reply, words = FAULTS[name]
    with serving(lambda request: reply) as stub:
        assert evaluate(stub.url, tmp_path, "--limit", "2", "--retries", "0") == 1
    result = read_run(tmp_path).benchmarks["quick"]
    assert result.causes == {"error": 2}
    assert words in result.missing[0][2]
    assert words in capsys.readouterr().out


def test_empty_contents_are_empty_answers(tmp_path: Path) -> None:
    replies = iter([as_parts(None), as_parts([]), as_parts(""), as_parts([THOUGHT])])
    with serving(lambda request: next(replies)) as stub:
        assert evaluate(stub.url, tmp_path, "--limit", "4", "--concurrency", "1") == 0
    assert read_run(tmp_path).benchmarks["quick"].causes == {"empty": 4}


def test_a_second_run_in_the_same_folder_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def while_running(request: dict[str, Any]) -> Reply:
        with pytest.raises(UsageError, match="in use"), lock_run(tmp_path):
            raise AssertionError("the run does not hold its folder")
        return all_right(request)

    with serving(while_running) as stub:
        assert evaluate(stub.url, tmp_path, "--limit", "2") == 0
        hold = (
            "import pathlib, sys, time\nfrom halfbyte.evals.records import lock_run\n"
            "with lock_run(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n"
            "    time.sleep(600)"
        )
        with subprocess.Popen(
            [sys.executable, "-c", hold, str(tmp_path)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(Path(halfbyte.__file__).parents[1])},
        ) as other:
            assert other.stdout is not None and other.stdout.readline() == b"held\n"
            assert evaluate(stub.url, tmp_path, "--limit", "2") == 2
            said = capsys.readouterr().err
            assert "in use" in said and str(other.pid) in said
            assert main(["grade", str(tmp_path)]) == 2
            other.kill()
        # The lock went with the process that held it, however that ended.
        assert evaluate(stub.url, tmp_path, "--limit", "2") == 0
        assert len(stub.requests) == 2


@pytest.mark.parametrize("name", ["attempts.jsonl", "samples.jsonl", "sessions.jsonl"])
def test_a_damaged_line_in_the_middle_is_named(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(all_right) as stub:
        assert evaluate(stub.url, tmp_path, "--limit", "4") == 0
        path = tmp_path / "quick" / name
        lines = path.read_bytes().splitlines(keepends=True)
        for damage in (b"\x00garbage\n", b"[1]\n", lines[0][:-9] + b"\n"):
            path.write_bytes(b"".join([lines[0], damage, *lines[1:]]))
            assert evaluate(stub.url, tmp_path, "--limit", "4") == 2
            assert f"{name}, line 2 is damaged" in capsys.readouterr().err


def test_images_travel_as_png_in_reading_order(tmp_path: Path) -> None:
    from PIL import Image

    folder = tmp_path / "data" / "mmmu_pro" / "images"
    folder.mkdir(parents=True)
    for name, mode, colour in (("a", "RGBA", (255, 0, 0, 0)), ("b", "P", 3), ("page", "L", 9)):
        Image.new(mode, (8, 8), colour).save(folder / f"{name}.png")
    row = {
        "question": "Is <image 2> like <image 1>?", "options": ["yes", "no <image 2>", "maybe"],
        "answer": "B", "image_1": "a.png", "image_2": "b.png", "vision_image": "page.png",
    }  # fmt: skip
    (folder / "items.jsonl").write_text(json.dumps(row) + "\n")
    common = ["--data", str(tmp_path / "data"), "--repeats", "1"]
    with serving(lambda request: completion("Answer: B")) as stub:
        names = ["mmmu_pro_standard", "mmmu_pro_vision", "mmmu_pro"]
        arguments = ["evaluate", stub.url, "--suite", *names, "--out", str(tmp_path / "run")]
        assert main([*arguments, *common]) == 0
    standard, vision, both = (request["messages"][0]["content"] for request in stub.requests)
    assert [part["type"] for part in standard] == [
        "text", "image_url", "text", "image_url", "text", "image_url", "text"
    ]  # fmt: skip
    images = [part["image_url"]["url"] for part in standard if part["type"] == "image_url"]
    assert images[0] == images[2] != images[1]
    assert all(uri.startswith("data:image/png;base64,iVBOR") for uri in images)
    assert "A, B, C" in standard[-1]["text"]
    assert [part["type"] for part in vision] == ["image_url", "text"]
    assert "A. yes" not in vision[1]["text"]
    assert "A. yes" in both[1]["text"]
    assert read_run(tmp_path / "run").benchmarks["mmmu_pro"].score == 1.0


def test_a_server_without_vision_is_not_measured_rather_than_zero(tmp_path: Path) -> None:
    from PIL import Image

    folder = tmp_path / "data" / "mmmu_pro" / "images"
    folder.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "page.png")
    row = {"question": "?", "options": ["x", "y"], "answer": "B", "vision_image": "page.png"}
    (folder / "items.jsonl").write_text(json.dumps(row) + "\n")
    with serving(lambda request: refusal(400, "this model takes no images")) as stub:
        status = main(
            ["evaluate", stub.url, "--suite", "mmmu_pro", "--data", str(tmp_path / "data"),
             "--out", str(tmp_path / "run")]
        )  # fmt: skip
    assert status == 0
    result = read_run(tmp_path / "run").benchmarks["mmmu_pro"]
    assert (result.status, result.score) == ("not measured", None)
    assert "takes no images" in result.reason


def test_a_checkpoint_folder_is_served_evaluated_and_let_go(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    write_tiny_checkpoint(folder, layers=1)
    for file in (Path(__file__).parents[1] / "data" / "chat" / "chatml").iterdir():
        shutil.copy(file, folder)
    out = tmp_path / "run"
    arguments = ["--suite", "quick", "--limit", "2", "--max-tokens", "4", "--out", str(out)]
    assert main(["evaluate", str(folder), *arguments, "--reasoning-effort", ""]) == 0
    run = read_run(out)
    result = run.benchmarks["quick"]
    assert (result.status, result.items, sum(result.causes.values())) == ("complete", 2, 2)
    assert result.completion_tokens == 8
    assert len(run.checkpoint["headers sha256"]) == 64
    assert run.checkpoint["identity"] == checkpoint_identity(folder)
    assert run.server["health"]["checkpoint"] == checkpoint_identity(folder)
    port = int(run.endpoint.rsplit(":", 1)[1].removesuffix("/v1"))
    with socket.socket() as probe, pytest.raises(ConnectionRefusedError):
        probe.connect(("127.0.0.1", port))
