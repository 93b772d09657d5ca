"""One attempt in, one score out, whatever the benchmark: the order in which causes are decided.

A failed or refused request, a cut answer and an empty one are settled here, before any grader
sees the text; judge and sandbox are handed in, so that stored answers can be graded again.
"""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.evals.grading import scripts
from halfbyte.evals.grading.judge import grade_judged, judge_prompt, read_verdict
from halfbyte.evals.sandbox import Interpreter, SandboxLimits, run_program
from halfbyte.evals.tasks.benchmark import Benchmark
from halfbyte.evals.tasks.scicode import codes_before
from halfbyte.evals.types import Attempt, Sample, Score, unparsed
from halfbyte.log import logger

Judge = Callable[[str], Awaitable[str]]


@dataclass(frozen=True, slots=True)
class CodeRunner:
    """How generated code is run: by which interpreter, within which limits, how many at once."""

    python: Interpreter
    limits: SandboxLimits
    slots: asyncio.Semaphore


@dataclass(frozen=True, slots=True)
class Graders:
    """What grading needs besides the texts; absent parts make their benchmarks ungradable.

    worker  one thread: graders are plain code that must neither block the loop nor overlap
            (language data and random state are shared)
    """

    judge: Judge | None = None
    code: CodeRunner | None = None
    worker: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))


async def score_attempt(
    benchmark: Benchmark,
    sample: Sample,
    attempt: Attempt,
    earlier: Sequence[Attempt],
    graders: Graders,
    judgement: str | None = None,
) -> Score:
    """Score one attempt, or say why it has no score.

    earlier    the attempts before it in its trajectory (SciCode), else empty
    judgement  a stored reply of the judge, used instead of asking when no judge is given

    A grader that fails gives an ungraded score with its reason: missing, never wrong, and never
    silently absent.
    """
    try:
        return await _score(benchmark, sample, attempt, earlier, graders, judgement)
    except HalfbyteError as failure:
        return Score(None, None, "ungraded", {"reason": str(failure)[:1000]})
    # Whatever else a grader raises is a fault of ours that must not cost the attempt.
    except Exception as failure:
        logger.exception("grading %s #%d failed", sample.item_id, attempt.repeat)
        reason = f"the grader failed: {type(failure).__name__}: {failure}"
        return Score(None, None, "ungraded", {"reason": reason[:1000]})


async def _score(
    benchmark: Benchmark,
    sample: Sample,
    attempt: Attempt,
    earlier: Sequence[Attempt],
    graders: Graders,
    judgement: str | None,
) -> Score:
    if attempt.error is not None:
        if attempt.refused:
            return Score(0.0, None, "refused", {"reason": attempt.error})
        return Score(None, None, "error", {"reason": attempt.error})
    if attempt.finish_reason == "length":
        return Score(0.0, None, "length")
    if not attempt.answer.strip():
        return Score(0.0, None, "empty")
    if benchmark.kind == "judged":
        return await _judged(sample, attempt.answer, graders.judge, judgement)
    if benchmark.kind == "code":
        return await _run(sample, attempt, earlier, graders.code)
    assert benchmark.grade is not None, benchmark.name
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(graders.worker, benchmark.grade, sample, attempt.answer)


async def _judged(sample: Sample, answer: str, judge: Judge | None, stored: str | None) -> Score:
    if judge is None:
        return grade_judged(sample.gold, answer, stored)
    prompt = judge_prompt(sample.fields["question"], sample.gold, answer)
    reply = await judge(prompt)
    if read_verdict(reply) is None:
        reply = await judge(prompt)  # once more, then it is ungraded
    return grade_judged(sample.gold, answer, reply)


async def _run(
    sample: Sample, attempt: Attempt, earlier: Sequence[Attempt], code: CodeRunner | None
) -> Score:
    if code is None:
        raise UsageError("grading SciCode needs an interpreter for generated code: --code-python")
    own = scripts.extract_code(attempt.answer)
    if not own.strip():
        return unparsed()
    f = sample.fields
    codes = [*codes_before(sample, [a.answer for a in earlier]), own]
    token = secrets.token_hex(8)
    program = scripts.step_program(f["problem"], f["index"], codes, f["targets"], token)
    async with code.slots:
        outcome = await asyncio.to_thread(
            run_program,
            code.python,
            program,
            limits=code.limits,
            visible=[Path(f["targets"])],
        )
    return scripts.grade_step(own, outcome, token)
