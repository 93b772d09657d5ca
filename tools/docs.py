"""Generated parts of the documents: README's figures and picture, the demo's output in
docs/start.md, all figures in docs/figures.md, the errors of verdicts in docs/evaluations.md, the
table and drawings of docs/guide/choosing-a-format.md, and benchmarks/README.md.

`python -m tools.docs` writes them from `benchmarks/records`; with `--check` it fails if
one is stale. A generated part of a page stands between `<!-- generated: NAME -->` and
`<!-- end generated -->`.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from tools import pareto
from tools.picture import formats_picture

from halfbyte.errors import CheckpointError
from halfbyte.figures import Figure, Record, Topic, read_record

# Records whose checkpoints the page draws, each in one run.
_QUALITY = ("quantize_quality",)
_MODES = ("declared", "weight_only")
ROOT = Path(__file__).resolve().parents[1]


def load_records(directory: Path) -> dict[str, Record]:
    """Every record of the directory by its file's stem."""
    return {path.stem: read_record(path) for path in sorted(directory.glob("*.json"))}


def demo_block(records: Mapping[str, Record]) -> str:
    """The transcript of the recorded demo run."""
    record = records["demo"]
    lines = "\n".join(record.results["transcript"])
    return f"```\n$ halfbyte demo\n{lines}\n```\n\n{origin('demo', record)}"


def quickstart_block(records: Mapping[str, Record]) -> str:
    """The transcript of the first commands."""
    lines = "\n".join(records["quickstart"].results["transcript"])
    return f"```console\n{lines}\n```"


def figures_block(records: Mapping[str, Record]) -> str:
    """One row per headline of every record that has some."""
    rows = [
        f"| {cells(figure)} | {record.machine.text} | [{stem}](benchmarks/records/{stem}.json) |"
        for stem, record in records.items()
        for figure in record.headlines
    ]
    head = [
        "| what | under | measured | against, in the same run | machine | record |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *rows])


def cells(figure: Figure) -> str:
    """What, under which conditions, how much and against what, as cells of a table."""
    return " | ".join((figure.name, figure.conditions_text, figure.value_text, figure.against_text))


def verdicts_block(records: Mapping[str, Record]) -> str:
    """How often a verdict is wrong, from the simulated comparisons."""
    record = records["verdicts"]
    results = record.results

    def largest(rows: Iterable[Mapping[str, Any]], *keys: str) -> str:
        return f"{max(row[key] for row in rows for key in keys):.1f} %"

    def no_go(row: Mapping[str, Any]) -> float:
        return float(row["NO-GO of a benchmark"] + row["NO-GO of the mean"])

    single = [row["wrong_go"] for row in results["single_answers"]]
    drawn, together = results["repeats_and_groups"], results["whole_groups"]
    kinds = ("wrong_go_even", "wrong_go_uneven"), ("t_bound_even", "t_bound_uneven")
    suites = {(row["sizes"], row["loss"]): row for row in results["suites"]}
    default, decide = (suites[name, "0 x margin"] for name in ("default repeats", "suite decide"))
    margins = suites["default repeats", "1 x margin"]
    looks = results["looks"]
    rows = [
        ("GO although the loss is the margin, one answer an item (exact, worst of "
         f"{len(single)} sizes)", largest(single, "score bound"),
         f"t bound: {largest(single, 't bound')}"),
        ("the same with repeats and groups (simulated, worst of "
         f"{2 * len(drawn)} cases)", largest(drawn, *kinds[0]),
         f"t bound: {largest(drawn, *kinds[1])}"),
        ("the same where the items of a group change together (simulated, worst of "
         f"{len(together)} cases of {together[0]['runs']:,} runs)", largest(together, "wrong_go"),
         ""),
        ("NO-GO of the whole suite although the arms are equal", f"{no_go(default):.1f} %", ""),
        ("NO-GO of a benchmark although every loss is just the margin",
         f"{margins['NO-GO of a benchmark']:.1f} %", ""),
        ("GO of the whole suite for equal arms, default repeats", f"{default['GO']:.1f} %",
         f"planned: {default['planned_go']:.1f} %"),
        ("the same with `--suite decide`", f"{decide['GO']:.1f} %",
         f"planned: {decide['planned_go']:.1f} %"),
        ("GO although the loss is the margin, at the first look or a second one",
         f"{largest(looks, 'two_planned_looks')} (planned), {largest(looks, 'fresh_at_1')} (fresh)",
         f"old and new pooled: {largest(looks, 'pooled_again_at_5')}"),
    ]  # fmt: skip
    lines = [f"| {what} | {found} | {other} |" for what, found, other in rows]
    head = ["| how often | measured | beside it |", "|---|---|---|"]
    name = "benchmarks/records/verdicts.json"
    return "\n".join([*head, *lines, "", f"From [{name}](../{name}), {record.date}."])


TOPICS: dict[Topic, str] = {
    "decode": "Decoding",
    "prefill": "Reading prompts",
    "serving": "Serving",
    "speculation": "Speculation",
    "start": "Starting",
    "quantize": "Quantizing",
    "fidelity": "What formats cost",
    "evaluation": "Evaluating",
    "kernels": "Kernels",
    "tests": "Tests",
    "peer": "Other programs and checkpoints in the same runs",
}


def all_figures_block(records: Mapping[str, Record]) -> str:
    """Every figure by topic, then by machine."""
    parts = []
    for topic, title in TOPICS.items():
        found = [(stem, record, figure) for stem, record in records.items()
                 for figure in record.figures if figure.topic == topic]  # fmt: skip
        machines = dict.fromkeys(record.machine.text for _, record, _ in found)
        if found:
            parts.append(f"## {title}")
        for machine in machines:
            rows = [
                f"| {cells(figure)} | [{stem}](../benchmarks/records/{stem}.json) |"
                for stem, record, figure in found
                if record.machine.text == machine
            ]
            head = ["| what | under | measured | against | record |", "|---|---|---|---|---|"]
            parts += [f"On {machine}:", "\n".join([*head, *rows])]
    return "\n\n".join(parts)


def pareto_block(records: Mapping[str, Record]) -> str:
    """Every checkpoint of the quality benchmark's runs: its bytes and what it loses."""
    parts = []
    for stem in (name for name in _QUALITY if name in records):
        record = records[stem]
        found = pareto.table(record.results, _MODES)
        said = f"From `benchmarks/records/{stem}.json`, {record.date}, {record.machine.text}."
        parts.append(f"{found}\n\nBold: in this run no other has less of both.\n{said}")
    return "\n\n".join(parts)


def drawings(records: Mapping[str, Record]) -> dict[str, str]:
    """Path below the root -> content of the drawings that pages show."""
    results = [records[name].results for name in _QUALITY if name in records]
    if not results:
        return {}
    return {
        f"docs/guide/bytes-against-kl-{mode}.svg": pareto.plot(
            pareto.joined([pareto.points_of(found, mode) for found in results]),
            title=f"KL against bytes, {mode}",
        )
        for mode in _MODES
    }


def origin(stem: str, record: Record) -> str:
    """Where a generated block of a page in docs/ comes from, for the reader."""
    return (
        f"From [benchmarks/records/{stem}.json](../benchmarks/records/{stem}.json): "
        f"{record.machine.text}, {record.date}."
    )


BLOCKS: dict[str, Callable[[Mapping[str, Record]], str]] = {
    "demo": demo_block,
    "quickstart": quickstart_block,
    "figures": figures_block,
    "all-figures": all_figures_block,
    "verdicts": verdicts_block,
    "bytes-against-kl": pareto_block,
}
PAGES = ("README.md", "docs/start.md", "docs/figures.md", "docs/evaluations.md",
         "docs/guide/choosing-a-format.md")  # fmt: skip


def render(text: str, records: Mapping[str, Record]) -> str:
    """`text` with every generated block made anew; raises CheckpointError for unknown blocks."""

    def replace(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in BLOCKS:
            raise CheckpointError(f"no generated block {name!r}; there are {', '.join(BLOCKS)}")
        return f"<!-- generated: {name} -->\n{BLOCKS[name](records)}\n<!-- end generated -->"

    return re.sub(
        r"<!-- generated: ([\w-]+) -->\n.*?<!-- end generated -->", replace, text, flags=re.DOTALL
    )


def benchmarks_page(records: Mapping[str, Record]) -> str:
    """benchmarks/README.md: what each record asks, its command and all its figures."""
    parts = [
        "# Benchmarks",
        "Generated from `records/` by `python -m tools.docs`; each file there holds every "
        "sample, the command, the machine and the versions. Comparisons are made in one run on one "
        "machine; `x` is the figure as a multiple of what it is compared with.",
    ]
    for stem, record in records.items():
        lines = [
            f"## {stem}",
            record.question,
            f"`{record.command}` on {record.machine.text}, {record.date}: "
            f"[records/{stem}.json](records/{stem}.json)",
        ]
        if record.figures:
            rows = [f"| {cells(figure)} |" for figure in record.figures]
            head = ["| what | under | measured | against |", "|---|---|---|---|"]
            lines.append("\n".join([*head, *rows]))
        parts.append("\n\n".join(line for line in lines if line))
    return "\n\n".join(parts) + "\n"


def stale_pages(root: Path) -> dict[Path, str]:
    """Pages whose generated content differs from the files, with what they should hold."""
    records = load_records(root / "benchmarks" / "records")
    wanted = {
        root / page: render((root / page).read_text(encoding="utf-8"), records)
        for page in PAGES
        if (root / page).exists()
    }
    wanted[root / "benchmarks" / "README.md"] = benchmarks_page(records)
    if "demo" in records:
        wanted[root / "docs" / "pictures" / "formats.svg"] = formats_picture(records["demo"])
    wanted |= {root / path: text for path, text in drawings(records).items()}
    return {
        path: text
        for path, text in wanted.items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    }


def main() -> int:
    """Write or check the generated pages; 1 if `--check` finds a stale one."""
    parser = argparse.ArgumentParser(prog="python -m tools.docs", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say which pages are stale")
    args = parser.parse_args()
    stale = stale_pages(ROOT)
    for path, text in stale.items():
        name = path.relative_to(ROOT)
        if args.check:
            print(f"{name} is stale; run python -m tools.docs", file=sys.stderr)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"wrote {name}")
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
