"""The documentation as a product: short lines, everything listed, generated pages fresh."""

import importlib
import importlib.util
import re
from pathlib import Path

import pytest
import yaml
from tools import docs
from tools.cli_reference import PAGE, reference_page
from tools.picture import formats_picture

from halfbyte.figures import read_record

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
COLUMNS = 100
# What is not prose: tables, code, generated parts, and words that cannot be parted.
_SKIPPED = re.compile(r"^\s*(?:\||<!--|!\[|\[[^\]]+\]:)")

_FENCE = re.compile(r"\s*(`{3,})")
_QUOTED = re.compile(r"`[^`]{60,}`")  # a message of another program


def prose(path: Path) -> list[tuple[int, str]]:
    lines, fence, generated = [], "", False
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        marks = _FENCE.match(line)
        # A longer fence holds shorter ones.
        if marks is not None and (not fence or len(marks[1]) >= len(fence)):
            fence = "" if fence else marks[1]
        elif line.startswith("<!-- generated"):
            generated = True
        elif line.startswith("<!-- end generated"):
            generated = False
        elif not fence and not generated and not _SKIPPED.match(line):
            lines.append((number, _QUOTED.sub("``", line)))
    return lines


def test_lines_of_prose_have_at_most_100_columns() -> None:
    pages = [*DOCS.rglob("*.md"), *ROOT.glob("*.md"), ROOT / "pocket" / "README.md"]
    pages += (ROOT / "benchmarks").glob("notes*.md")
    long = [
        f"{path.relative_to(ROOT)}:{number}: {len(line)} columns"
        for path in pages
        for number, line in prose(path)
        if len(line) > COLUMNS and " " in line[:COLUMNS].strip()
    ]
    assert not long, "\n".join(long)


def test_readme_takes_a_minute() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_every_page_is_in_the_navigation() -> None:
    text = re.sub(r"!ENV", "", (ROOT / "mkdocs.yml").read_text())
    listed = set(re.findall(r"[\w/-]+\.md", str(yaml.safe_load(text)["nav"])))
    there = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    assert listed == {name for name in there if not name.startswith("decisions/0")}


def test_every_decision_is_in_the_index_once_under_its_title() -> None:
    index = (DOCS / "decisions" / "index.md").read_text()
    for path in sorted((DOCS / "decisions").glob("0*.md")):
        heading = path.read_text().split("\n", 1)[0].removeprefix(f"# {path.name[:4]} ")
        row = f"| {path.name[:4]} | [{heading}]({path.name}) | "
        assert index.count(row) == 1, f"docs/decisions/index.md lacks the row: {row}stands |"


def test_the_page_of_commands_is_fresh_and_the_same_elsewhere() -> None:
    text = reference_page()
    assert PAGE.read_text() == text, "run python -m tools.cli_reference"
    assert "/root" not in text and "/home" not in text
    assert "## halfbyte quantize" in text and "### halfbyte bench cpu" in text
    assert "| `--method` max \\| headroom" in text


def test_the_picture_draws_the_record() -> None:
    record = read_record(ROOT / "benchmarks" / "records" / "demo.json")
    svg = formats_picture(record)
    assert svg.startswith('<svg xmlns="http://www.w3.org/2000/svg"')
    for figure in record.figures:
        is_drawn = figure.name in ("weights on disk", "KL divergence from bf16")
        if is_drawn and "arithmetic" not in figure.conditions:
            assert figure.value_text in svg


def test_all_figures_of_all_records_are_on_the_page_once() -> None:
    records = docs.load_records(ROOT / "benchmarks" / "records")
    rows = [line for line in docs.all_figures_block(records).splitlines() if line.startswith("| ")]
    figures = [figure for record in records.values() for figure in record.figures]
    heads = sum(line.startswith("| what |") for line in rows)
    assert len(rows) - heads == len(figures)


def hooks(name: str) -> object:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_links_out_of_the_docs_become_the_path_they_name() -> None:
    class Page:
        class file:
            src_path = "guide/x.md"

    text = "[a](../api.md#fields) [record](../../benchmarks/README.md) [`LICENSE`](../../LICENSE)"
    found = hooks("site_hooks").on_page_markdown(  # type: ignore[attr-defined]
        text, page=Page, config={"docs_dir": str(DOCS)}
    )
    assert found == "[a](../api.md#fields) record (`benchmarks/README.md`) `LICENSE`"


def test_aligned_parameters_become_a_list() -> None:
    pytest.importorskip("griffe")
    as_markdown = hooks("site_docstrings").as_markdown  # type: ignore[attr-defined]
    text = (
        "Encode.\n\nw_OI     a weight,\n         bf16\nreturns  codes\n\nTo 2**-9 and **no** less."
    )
    wanted = "Encode.\n\n- `w_OI`: a weight,\n  bf16\n- `returns`: codes\n\n"
    assert as_markdown(text) == wanted + "To 2\\*\\*-9 and **no** less."


# A module that the site renders, and the members that it is limited to.
_RENDERED = re.compile(r"^::: ([\w.]+)\n(?: +options: \{members: \[([\w, ]+)\]\})?", re.MULTILINE)


def test_what_the_site_renders_of_modules_is_defined_in_them() -> None:
    rendered = [
        (module, name)
        for path in DOCS.rglob("*.md")
        for module, names in _RENDERED.findall(path.read_text(encoding="utf-8"))
        for name in (names or "__doc__").split(", ")
    ]
    assert len(rendered) > 15
    absent = []
    for module, name in rendered:
        found = getattr(importlib.import_module(module), name, None)
        if found is None or getattr(found, "__module__", module) != module:
            absent.append(f"{module}.{name}")
    assert not absent, f"docs name what is defined elsewhere or nowhere: {absent}"
