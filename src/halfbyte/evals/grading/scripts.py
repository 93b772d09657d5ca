"""SciCode: the prompt of a step, the code in an answer, and the programs that test it.

Building text only; the programs are run by `sandbox`, tests and code in worlds of their own
(decision 0057). Steps of a problem build on each other: a
step's program holds the model's own code of the steps before it.
Rules: docs/reference/scoring.md#scicode.
"""

import io
import json
import re
import tokenize
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from halfbyte.errors import UnsupportedError
from halfbyte.evals.sandbox import Interpreter, Outcome, Pair, SandboxLimits, run_program
from halfbyte.evals.types import Score, right_or_wrong, unparsed

# Given in the data set with fixed code: not generated, not tested, not counted.
GIVEN_STEPS = ("13.6", "62.1", "76.3")

RUNTIME = "scicode_runtime.py"
TESTER, WORKER, WIRE = "scicode_tester.py", "scicode_worker.py", "scicode_wire.py"
_DEFINED = re.compile(r"^(?:def|class)\s+(\w+)", re.MULTILINE)

_OPENING = re.compile(r"(?P<fence>`{3,}|~{3,})")
_LANGUAGE = re.compile(r"[ \t]*\{?\.?(?P<name>[\w+#.-]*)\}?[^\n]*?(?P<end>\n|\Z)")
_PYTHON = re.compile(r"(?:i?python|py)[\d.]*$", re.IGNORECASE)
_FROM = re.compile(r"[\w.]+")
_STATEMENT_ENDS = (tokenize.NEWLINE, tokenize.ENDMARKER)
_NO_TOKENS = (tokenize.NL, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT)

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
    """The code of an answer, without its imports; empty if there is none.

    The first block marked as Python that holds something, else the first without a language, else
    the first; without any block the whole text. A block ends at the next fence, also one at the end
    of a line of code.
    """
    blocks = _blocks(text)
    if not blocks:
        return drop_imports(text).strip("\n")
    ranks = sorted(blocks, key=lambda block: (_rank(block[0]), not block[1].strip()))
    return drop_imports(ranks[0][1]).strip("\n")


def _rank(language: str) -> int:
    if _PYTHON.match(language):
        return 0
    return 1 if not language else 2


def _blocks(text: str) -> list[tuple[str, str]]:
    """Language and content of each fenced block, in order."""
    found, position = [], 0
    while (opening := _OPENING.search(text, position)) is not None:
        closing = re.compile(re.escape(opening["fence"])).search(text, opening.end())
        end = closing.start() if closing else len(text)
        rest = text[opening.end() : end]
        language = _LANGUAGE.match(rest)
        assert language is not None
        if language["end"]:
            found.append((language["name"], rest[language.end() :]))
        elif _PYTHON.match(language["name"]):  # all on one line: "```python x = 1```"
            found.append((language["name"], rest[language.end("name") :].lstrip()))
        else:
            found.append(("", rest))
        position = closing.end() if closing else len(text)
    return found


def drop_imports(code: str) -> str:
    """Remove import statements: the dependencies of the problem are the only ones allowed.

    Read by Python's own tokens, so that words in texts and comments stay. A nested import becomes
    `pass`, so that a block that held nothing else stays valid.
    """
    lines = code.split("\n")
    for start, end in reversed(_import_places(code)):
        first, last = lines[start[0] - 1], lines[end[0] - 1]
        before, after = first[: start[1]], last[end[1] :]
        is_alone = not before and not after.split("#")[0].strip()
        kept = [] if is_alone else [f"{before}pass{after}" if after.strip() else f"{before}pass"]
        lines[start[0] - 1 : end[0]] = kept
    return "\n".join(lines)


def _import_places(code: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where each import statement begins and ends, as (line, column)."""
    found: list[tuple[tuple[int, int], tuple[int, int]]] = []
    statement: list[tokenize.TokenInfo] = []
    try:
        for token in tokenize.generate_tokens(io.StringIO(code).readline):
            is_end = token.type in _STATEMENT_ENDS or token.string == ";"
            if is_end or token.type in _NO_TOKENS:
                if is_end:
                    found += _import_of(statement)
                    statement = []
                continue
            statement.append(token)
    except (tokenize.TokenError, SyntaxError):
        found += _import_of(statement)  # such as an open bracket: what came before it was read
    return found


def _import_of(
    statement: Sequence[tokenize.TokenInfo],
) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """The place of the import in a statement, which may follow the colon of another on its line."""
    for index, token in enumerate(statement):
        if token.type != tokenize.NAME or token.string != "import":
            continue
        start = index
        while start > 0 and _FROM.fullmatch(statement[start - 1].string):
            start -= 1
            if statement[start].string == "from":
                break
        if statement[start].string != "from":
            start = index
        return [(statement[start].start, statement[-1].end)]
    return []


def step_program(
    problem: Mapping[str, Any],
    index: int,
    codes: Sequence[str],
    targets_path: str,
    token: str,
) -> Pair:
    """The tests of step `index` and, apart from them, the code: `codes` has the step's own last.

    All tests run in one process and in order, because later ones use names of earlier ones; the
    code is in a second process that has neither tests nor targets. The tests print `token` when
    they have all held. Without a path there are no targets.
    """
    steps = problem["sub_steps"][: index + 1]
    headers = "\n".join(step["function_header"] for step in steps)
    step = {
        "dependencies": problem["required_dependencies"],
        "tests": steps[-1]["test_cases"],
        "functions": _DEFINED.findall(headers),
        "targets": [targets_path, steps[-1]["step_number"]] if targets_path else [],
        "token": token,
    }
    start = "import json, sys\nsys.path.insert(0, '/box')\nimport {module}\n"
    channel = "*map(int, sys.argv[1:3])"
    tester = start.format(module="scicode_tester") + (
        f"step = json.loads({json.dumps(step)!r})\nsys.exit(scicode_tester.main(step, {channel}))\n"
    )
    worker = start.format(module="scicode_worker") + f"scicode_worker.main({channel})\n"
    wire = _text_of(WIRE)
    return Pair(
        tester,
        {RUNTIME: runtime_source(), TESTER: _text_of(TESTER), WIRE: wire},
        worker,
        {
            "code.py": "\n\n".join([problem["required_dependencies"], *codes]) + "\n",
            WORKER: _text_of(WORKER),
            WIRE: wire,
        },
    )


# What the tests of a step import whatever the step is.
_IMPORTED = ("numpy", "scipy", "h5py")
_NEEDED = "It needs NumPy below 2, SciPy 1.10 to 1.13, sympy, matplotlib and h5py"


def check_interpreter(python: Interpreter) -> None:
    """Run one small step as attempts are run, so that what is missing is said before any is asked.

    Raises UnsupportedError with what it lacks, or with the last of its own words.
    """
    if absent := [name for name in _IMPORTED if name not in python.versions]:
        raise UnsupportedError(
            f"{python.path} cannot run SciCode's tests: it lacks {', '.join(absent)}. {_NEEDED}"
        )
    test = "assert np.allclose(check(1.0), 2.0)"
    step = {"step_number": "0.1", "function_header": "def check(x):", "test_cases": [test]}
    problem = {"required_dependencies": "import numpy as np", "sub_steps": [step]}
    code = "def check(x):\n    return np.asarray(x) + 1"
    program = step_program(problem, 0, [code], "", "held")
    outcome = run_program(python, program, limits=SandboxLimits(wall_s=120))
    if grade_step(code, outcome, "held").value != 1.0:
        last = (outcome.stderr.strip().splitlines() or ["it said nothing"])[-1][-300:]
        raise UnsupportedError(
            f"{python.path} cannot run SciCode's tests: {outcome.ending} with exit code "
            f"{outcome.exit_code}: {last}. {_NEEDED}"
        )


def runtime_source() -> str:
    """Text of the module with the comparisons and the reader of targets that the tests import."""
    return _text_of(RUNTIME)


def _text_of(name: str) -> str:
    return resources.files("halfbyte.evals.grading").joinpath(name).read_text()


def grade_step(code: str, outcome: Outcome | None, token: str) -> Score:
    """Passed when every test held: the tests' process left with 0 and printed `token`.

    No code: unparsed, not run.
    """
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
