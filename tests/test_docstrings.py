"""A public docstring begins with a sentence that stands by itself."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "halfbyte"
# Fewer words leave out the subject, the quantity or the unit.
FEWEST_WORDS = 8
Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def first_lines(text: str) -> Iterator[tuple[str, int, str]]:
    """Name, line number and first docstring line of what a file documents in public."""

    def walk(node: ast.AST, path: str) -> Iterator[tuple[str, int, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Documented):
                is_dunder = child.name.startswith("__")
                if child.name.startswith("_") and not is_dunder:
                    continue
                if found := ast.get_docstring(child):
                    yield f"{path}{child.name}", child.lineno, found.split("\n")[0]
                if isinstance(child, ast.ClassDef):
                    yield from walk(child, f"{path}{child.name}.")
            elif isinstance(child, ast.If | ast.Try):
                yield from walk(child, path)

    yield from walk(ast.parse(text), "")


def fault(line: str) -> str | None:
    """What keeps a first line from being a sentence, as far as a program can tell."""
    if not line.endswith("."):
        return "goes on in the next line; end the first sentence in the first line"
    if len(line.split()) < FEWEST_WORDS:
        return f"has fewer than {FEWEST_WORDS} words; name the subject, the quantity, the unit"
    return None


def test_first_lines_are_sentences() -> None:
    wrong = [
        f"{path.relative_to(SOURCE)}:{number} {name}: {line!r} {why}"
        for path in sorted(SOURCE.rglob("*.py"))
        for name, number, line in first_lines(path.read_text(encoding="utf-8"))
        if (why := fault(line)) is not None
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("line", ["Close.", "Of the cache.", "Bytes of one rank's weights and of"])
def test_a_fragment_is_found(line: str) -> None:
    text = f'class Cache:\n    def num_bytes(self):\n        """{line}\n        """\n'
    assert [(name, fault(said) is None) for name, _, said in first_lines(text)] == [
        ("Cache.num_bytes", False)
    ]


def test_what_is_private_may_be_short() -> None:
    text = 'def _f():\n    """Short."""\nclass _C:\n    def f(self):\n        """Short."""\n'
    assert not list(first_lines(text))
