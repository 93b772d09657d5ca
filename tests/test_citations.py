"""What the text of the repository points to is there: files, headings, decisions."""

import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLACES = ("src", "tests", "docs", "benchmarks", "pocket", "clients", "tools")
TEXTS = (".py", ".md", ".c", ".h", ".cu", ".js", ".jinja", ".yaml", ".yml", ".toml")
# Folders of data: other projects' texts and recorded answers, which cite what they like.
DATA = (ROOT / "tests" / "data", ROOT / "benchmarks" / "records")
_LINK = re.compile(r"\]\((?!\w+:|#)([^)\s#]+)?(?:#([\w.-]+))?\)")
_SELF = re.compile(r"\]\(#([\w-]+)\)")
# docs/reference/formats.md#gguf, or a list: docs/reference/formats.md, #gguf and #edge-cases
_DOC = re.compile(r"\bdocs/[\w/-]+\.md(?:(?:,|,? and)?\s*#[a-z][a-z0-9-]+)*")
_CODE = re.compile(
    r"(?<![\w/])(?:benchmarks|tests|src|pocket|clients|tools)/[\w./-]*\w\.(?:py|md|json|cu|c|html)\b"
)
_DECISIONS = re.compile(r"\b[Dd]ecisions? ((?:\d{4}(?:, | and | to )?)+)")
_ELSEWHERE = re.compile(
    r"\.\./shared|\b(?:format|small-models|evaluation|chat)s? reference\b|\breference,? section \d|"
    r"\bsection \d[\d.]* of the \w*\s*reference|\bhouse style\b"
)


def texts() -> Iterator[Path]:
    listed = subprocess.run(
        ["git", "ls-files", *PLACES, "*.md"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split("\n")
    paths = [ROOT / name for name in listed if name] or [
        path for place in PLACES for path in (ROOT / place).rglob("*")
    ]
    for path in paths:
        is_data = any(folder in path.parents for folder in DATA)
        if path.suffix in TEXTS and path.is_file() and not is_data and path != Path(__file__):
            yield path


@cache
def anchors(path: Path) -> frozenset[str]:
    """Anchors of a page's headings, as GitHub and the site make them."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    found = []
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        plain = re.sub(r"[^\w\s-]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower())
        found.append(re.sub(r"\s", "-", plain.strip()))
    return frozenset(found)


def missing(path: Path) -> Iterator[str]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        for target, anchor in _LINK.findall(prose):
            page = (path.parent / target).resolve() if target else path
            if not page.exists():
                yield f"link to {target}"
            elif anchor and page.suffix == ".md" and anchor not in anchors(page):
                yield f"link to {target}#{anchor}"
        yield from (
            f"link to #{name}" for name in _SELF.findall(prose) if name not in anchors(path)
        )
    for cited in _DOC.findall(text):
        name, *wanted = re.split(r"\s*,?(?:\s+and)?\s*#", cited)
        page = ROOT / name
        if not page.is_file():
            yield name
            continue
        yield from (f"{name}#{one}" for one in wanted if one not in anchors(page))
    yield from (name for name in _CODE.findall(text) if not (ROOT / name).exists())
    for numbers in _DECISIONS.findall(text):
        for number in re.findall(r"\d{4}", numbers):
            if not list((ROOT / "docs" / "decisions").glob(f"{number}-*.md")):
                yield f"decision {number}"
    yield from (f"what is not here: {found}" for found in _ELSEWHERE.findall(text))


def test_everything_cited_exists() -> None:
    wrong = [f"{path.relative_to(ROOT)}: {what}" for path in texts() for what in missing(path)]
    assert not wrong, "\n".join(wrong)


def test_the_checked_texts_are_many() -> None:
    assert len(list(texts())) > 400


@pytest.mark.parametrize(
    "text",
    [
        "see [x](nothing.md)", "see [x](../README.md#no-such-heading)", "[x](#nowhere)",
        "docs/reference/formats.md#no-such-rule", "docs/reference/formats.md, #gguf and #nothing",
        "docs/nothing.md", "tests/nothing/test_x.py", "decision 9999", "decisions 0001 and 9998",
        "Source: checkpoint-format reference, section 9", "in ../shared/x",
    ],
)  # fmt: skip
def test_a_citation_of_nothing_is_found(tmp_path: Path, text: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    assert len(list(missing(page))) == 1


@pytest.mark.parametrize(
    "text", ["docs/reference/formats.md, #gguf and #edge-cases.", "decision 0001", "[x](#a) \n# A"]
)
def test_a_citation_that_holds_is_left_alone(tmp_path: Path, text: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    assert not list(missing(page))
