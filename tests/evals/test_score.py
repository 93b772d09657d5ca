"""The order in which an answer's ending, its judge and its sandbox decide the score."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from halfbyte.evals import score as score_module
from halfbyte.evals.grading import scripts
from halfbyte.evals.sandbox import Interpreter, Outcome, SandboxLimits
from halfbyte.evals.score import CodeRunner, Graders, score_attempt
from halfbyte.evals.tasks.suite import BENCHMARKS
from halfbyte.evals.types import Attempt, Sample, Score

ANSWERED = Attempt("b", "i", 0, 1, "00", "an answer", "", "stop", 1, 1, 0, 0.1)
JUDGED, CODE, LETTER = BENCHMARKS["aa_lcr"], BENCHMARKS["scicode"], BENCHMARKS["gpqa_diamond"]


def graded(
    benchmark: Any, sample: Sample, attempt: Attempt, graders: Graders, **more: Any
) -> Score:
    earlier: Sequence[Attempt] = more.pop("earlier", ())
    return asyncio.run(score_attempt(benchmark, sample, attempt, earlier, graders, **more))


def sample(gold: str = "B", **fields: Any) -> Sample:
    return Sample("i", "g", "s", gold, {"question": "Which?", **fields})


@pytest.mark.parametrize("benchmark", [JUDGED, CODE, LETTER])
@pytest.mark.parametrize(
    "change, value, cause",
    [
        ({"error": "too long", "refused": True}, 0.0, "refused"),
        ({"error": "out of memory"}, None, "error"),
        ({"error": "gone", "answer": "", "finish_reason": "length"}, None, "error"),
        ({"finish_reason": "length"}, 0.0, "length"),
        ({"finish_reason": "length", "answer": ""}, 0.0, "length"),
        ({"answer": " \n"}, 0.0, "empty"),
    ],
)
def test_how_an_answer_ended_comes_before_any_grader(
    benchmark: Any, change: dict[str, Any], value: float | None, cause: str
) -> None:
    """Graders that are not there would leave it ungraded."""
    found = graded(benchmark, sample(), replace(ANSWERED, **change), Graders())
    assert (found.value, found.cause) == (value, cause)
    assert found.details.get("reason") == change.get("error")


def judge(*replies: str) -> tuple[Graders, list[str]]:
    asked: list[str] = []

    async def reply(prompt: str) -> str:
        asked.append(prompt)
        return replies[len(asked) - 1]

    return Graders(judge=reply), asked


@pytest.mark.parametrize(
    "replies, value, cause",
    [
        (("CORRECT",), 1.0, "ok"),
        (("INCORRECT",), 0.0, "wrong"),
        (("hm", "CORRECT"), 1.0, "ok"),
        (("hm", "INCORRECT"), 0.0, "wrong"),
        (("hm", "well"), None, "ungraded"),
    ],
)
def test_an_unreadable_judge_is_asked_once_more(
    replies: tuple[str, ...], value: float | None, cause: str
) -> None:
    graders, asked = judge(*replies)
    found = graded(JUDGED, sample("gold text"), ANSWERED, graders, judgement="CORRECT")
    assert (found.value, found.cause, len(asked)) == (value, cause, len(replies))
    assert len(set(asked)) == 1
    assert all(part in asked[0] for part in ("Which?", "gold text", "an answer"))
    assert found.details["judgement"] == replies[-1]


@pytest.mark.parametrize(
    "stored, value, cause",
    [("CORRECT", 1.0, "ok"), ("INCORRECT", 0.0, "wrong"), (None, None, "ungraded")],
)
def test_without_a_judge_the_stored_reply_decides(
    stored: str | None, value: float | None, cause: str
) -> None:
    found = graded(JUDGED, sample("x"), ANSWERED, Graders(), judgement=stored)
    assert (found.value, found.cause) == (value, cause)


def step(index: int = 0) -> Sample:
    steps = [{"step_number": f"77.{n}", "step_code": ""} for n in (1, 2)]
    return sample(
        problem={"problem_id": "77", "sub_steps": steps}, index=index, targets="t.h5", given={}
    )


def fenced(code: str) -> Attempt:
    return replace(ANSWERED, answer=f"```python\n{code}\n```")


def runner() -> Graders:
    limits = SandboxLimits(wall_s=7)
    return Graders(code=CodeRunner(Interpreter("python", (), {}), limits, asyncio.Semaphore(1)))


def test_code_is_run_with_the_steps_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: dict[str, Any] = {}

    def program(problem: Any, index: int, codes: list[str], targets: str, token: str) -> str:
        ran.update(index=index, codes=codes, targets=targets)
        return token

    def run(python: Any, given: str, *, limits: SandboxLimits, visible: Any) -> Outcome:
        ran.update(limits=limits, visible=[str(path) for path in visible])
        ending, code = ran["ends"]
        said = given if ran["says"] else "another token"
        return Outcome(ending, code, 0, said, "", 0.5, ())

    monkeypatch.setattr(scripts, "step_program", program)
    monkeypatch.setattr(score_module, "run_program", run)
    for ends, says, value in [
        (("exited", 0), True, 1.0),
        (("exited", 1), True, 0.0),
        (("wall", 0), True, 0.0),
        (("exited", 0), False, 0.0),
    ]:
        ran.update(ends=ends, says=says)
        found = graded(CODE, step(1), fenced("b = 2"), runner(), earlier=[fenced("a = 1")])
        assert (found.value, found.cause) == (value, "ok" if value else "wrong")
        assert found.extracted is not None and found.extracted.strip() == "b = 2"
    assert [code.strip() for code in ran["codes"]] == ["a = 1", "b = 2"]
    assert (ran["index"], ran["targets"], ran["visible"]) == (1, "t.h5", ["t.h5"])
    assert ran["limits"].wall_s == 7


def test_an_answer_without_code_is_unextracted_and_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_module, "run_program", None)
    for text in ("```python\n```", "```python\n   \n```"):
        found = graded(CODE, step(), replace(ANSWERED, answer=text), runner())
        assert (found.value, found.extracted, found.cause) == (0.0, None, "unparsed")


def test_code_without_an_interpreter_is_missing_not_wrong() -> None:
    found = graded(CODE, step(), fenced("a = 1"), Graders())
    assert (found.value, found.cause) == (None, "ungraded")
    assert "--code-python" in found.details["reason"]


def test_a_grader_that_breaks_costs_no_attempt() -> None:
    def broken(_: Sample, text: str) -> Score:
        raise RuntimeError(f"cannot read {text}")

    found = graded(replace(LETTER, grade=broken), sample(), ANSWERED, Graders())
    assert (found.value, found.cause) == (None, "ungraded")
    assert found.details["reason"] == "the grader failed: RuntimeError: cannot read an answer"


def test_other_kinds_are_graded_by_their_own_rule() -> None:
    options = {"options": ["w", "x", "y", "z"], "letters": "ABCD"}
    found = {
        text: graded(LETTER, sample("B", **options), replace(ANSWERED, answer=text), Graders())
        for text in ("Answer: B", "Answer: C", "I do not know")
    }
    assert [one.cause for one in found.values()] == ["ok", "wrong", "unparsed"]
