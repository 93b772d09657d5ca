"""What is read at one glance stays small: files, functions, lists of parameters."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "halfbyte"
MOST_FILE_LINES = 500
MOST_FUNCTION_LINES = 60
MOST_PARAMETERS = 8

# What is longer, and why that reads better than in parts.
LONGER = {
    # One call with a keyword for each of the 36 fields of a row.
    "evals/judging/compare.py:_compare_benchmark",
}
# What takes more, and why no two of its parameters belong together.
TAKES_MORE = {
    # A keyword for each field of the file that it writes.
    "bench/record.py:write",
    # A keyword for each quantity that takes memory or limits it, most of which tests leave out.
    "quantize/memory.py:plan_memory",
    # A keyword for each way in which test models differ.
    "model/tiny.py:write_tiny_checkpoint",
}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(text: str) -> Iterator[Function]:
    yield from (node for node in ast.walk(ast.parse(text)) if isinstance(node, Function))


def num_parameters(function: Function) -> int:
    """Parameters of a function, without the object or class that it is called on."""
    args = function.args
    positional = [*args.posonlyargs, *args.args]
    is_method = bool(positional) and positional[0].arg in ("self", "cls")
    stars = (args.vararg is not None) + (args.kwarg is not None)
    return len(positional) - is_method + len(args.kwonlyargs) + stars


def sizes() -> dict[str, tuple[int, int]]:
    """Lines and parameters of every function, by file and name; of two of a name the larger."""
    found: dict[str, tuple[int, int]] = {}
    for path in sorted(SOURCE.rglob("*.py")):
        for function in functions(path.read_text(encoding="utf-8")):
            name = f"{path.relative_to(SOURCE)}:{function.name}"
            lines = (function.end_lineno or 0) - function.lineno + 1
            before = found.get(name, (0, 0))
            found[name] = (max(before[0], lines), max(before[1], num_parameters(function)))
    return found


def test_functions_fit_a_screen_and_take_few_things() -> None:
    all_sizes = sizes()
    long = {name for name, (lines, _) in all_sizes.items() if lines > MOST_FUNCTION_LINES}
    many = {name for name, (_, count) in all_sizes.items() if count > MOST_PARAMETERS}
    # Equal, so that an exception that is needed no longer goes.
    assert long == LONGER, {name: all_sizes[name] for name in long ^ LONGER}
    assert many == TAKES_MORE, {name: all_sizes[name] for name in many ^ TAKES_MORE}


def test_files_are_read_in_one_sitting() -> None:
    kinds = (".py", ".js", ".css", ".html", ".c", ".h", ".cu")
    long = {
        str(path.relative_to(SOURCE))
        for path in SOURCE.rglob("*")
        if path.suffix in kinds
        and len(path.read_text(encoding="utf-8").splitlines()) > MOST_FILE_LINES
    }
    assert not long


@pytest.mark.parametrize(
    "text, count",
    [
        ("def f(a, /, b, *c, d, **e): ...", 5),
        ("def f(self, a): ...", 1),
        ("async def f(cls): ...", 0),
        ("def f(): ...", 0),
    ],
)
def test_every_kind_of_parameter_counts(text: str, count: int) -> None:
    (function,) = functions(text)
    assert num_parameters(function) == count
