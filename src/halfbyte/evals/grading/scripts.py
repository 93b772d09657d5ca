"""SciCode: the prompt of a step, the code in an answer, and the program that tests it.

Building text only; the program is run by `sandbox`. Steps of a problem build on each other: a
step's program holds the model's own code of the steps before it.
Source: ../shared/reference/evaluations.md section 3.4.
"""

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from halfbyte.evals.sandbox import Outcome
from halfbyte.evals.types import Score, right_or_wrong, unparsed

# Given in the data set with fixed code: not generated, not tested, not counted.
GIVEN_STEPS = ("13.6", "62.1", "76.3")

RUNTIME = "scicode_runtime.py"

_PYTHON_BLOCK = re.compile(r"```python[ \t]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)
_ANY_BLOCK = re.compile(r"```[^\n`]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)
_IMPORT = re.compile(r"(?P<indent>[ \t]*)(?:import\s+\S|from\s+\S+\s+import\b)")

PROMPT = """\
You solve a scientific programming problem step by step. The earlier steps are given with their \
code; write the code of the next step.

EARLIER STEPS AND THEIR CODE:

{earlier}

NEXT STEP:

{next}

DEPENDENCIES (already imported, do not import them again):

{dependencies}

Write the complete Python function or class of the next step, with exactly the header given above, \
in a single block in the format of ```python```. Do not repeat the dependencies or the code of \
earlier steps; call earlier functions by their given headers. Write no example usage, no tests."""


def step_prompt(
    problem: Mapping[str, Any], index: int, codes: Sequence[str], with_background: bool
) -> str:
    """The message for step `index`; `codes` holds the code of the steps before it."""
    steps = problem["sub_steps"]
    earlier = "\n\n------\n\n".join(
        f"{_description(step, with_background)}\n\n{code.strip()}"
        for step, code in zip(steps[:index], codes, strict=True)
    )
    step = steps[index]
    following = (
        f"{_description(step, with_background)}\n\n{step['function_header']}\n\n"
        f"{step['return_line']}"
    )
    return PROMPT.format_map(
        {
            "earlier": earlier or "(this is the first step)",
            "next": following,
            "dependencies": problem["required_dependencies"],
        }
    )


def _description(step: Mapping[str, Any], with_background: bool) -> str:
    background = step.get("step_background") or ""
    parts = [step["step_description_prompt"], background if with_background else ""]
    return "\n".join(part for part in parts if part.strip())


def extract_code(text: str) -> str:
    """The first ```python block, else the first block, else everything; without its imports."""
    block = _PYTHON_BLOCK.search(text) or _ANY_BLOCK.search(text)
    return drop_imports(block[1] if block else text).strip("\n")


def drop_imports(code: str) -> str:
    """Remove import statements: the dependencies of the problem are the only ones allowed.

    An indented import becomes `pass`, so that a block that held nothing else stays valid.
    """
    kept: list[str] = []
    in_brackets = continued = False
    for line in code.splitlines():
        match = None if in_brackets or continued else _IMPORT.match(line)
        if match:
            if match["indent"]:
                kept.append(f"{match['indent']}pass")
        elif not (in_brackets or continued):
            kept.append(line)
            continue
        in_brackets = ("(" in line or in_brackets) and ")" not in line
        continued = line.rstrip().endswith("\\")
    return "\n".join(kept)


def step_program(
    problem: Mapping[str, Any],
    index: int,
    codes: Sequence[str],
    targets_path: str,
    token: str,
) -> str:
    """The program that decides step `index`: `codes` includes the step's own code, last.

    All tests run in one process and in order, because later ones use names of earlier ones. It
    prints `token` at its end, so that a program that leaves early does not count as passed.
    """
    step = problem["sub_steps"][index]
    tests = step["test_cases"]
    lines = [
        "import sys as _sys",
        "_sys.path.insert(0, '/box')",
        "import scicode_runtime as _runtime",
        "for _name in ('scicode', 'scicode.compare', 'scicode.compare.cmp'):",
        "    _sys.modules[_name] = _runtime",
        problem["required_dependencies"],
        *codes,
        f"_targets = _runtime.read_targets{(targets_path, step['step_number'], len(tests))!r}",
    ]
    for number, test in enumerate(tests):
        lines += [f"target = _targets[{number}]", test]
    lines.append(f"print({token!r})")
    return "\n\n".join(lines) + "\n"


def runtime_source() -> str:
    """Text of the module that the program imports; goes beside it into the sandbox."""
    return resources.files("halfbyte.evals.grading").joinpath(RUNTIME).read_text()


def grade_step(code: str, outcome: Outcome | None, token: str) -> Score:
    """Passed when the program left with 0 and reached its end. No code: unparsed, not run."""
    if outcome is None or not code.strip():
        return unparsed()
    passed = outcome.ending == "exited" and outcome.exit_code == 0 and token in outcome.stdout
    return right_or_wrong(
        passed,
        code,
        ending=outcome.ending,
        exit_code=outcome.exit_code,
        stderr=outcome.stderr[-500:],
        wall_s=round(outcome.wall_s, 3),
    )
