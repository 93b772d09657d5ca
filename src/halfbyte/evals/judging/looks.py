"""Margins and looks: what has to be fixed before a comparison for its verdict to hold.

A verdict errs at most one time in twenty if there is one look at the data. Who looks again until
the answer pleases errs more often, so a further look is either planned from the start (the level
is shared equally, whatever is added in between) or made with fresh repeats alone, at the level
that was kept aside for it. Source of the shared level: Bonferroni's inequality, which holds for
any timing; Pocock (Biometrika 64, 191, 1977) gains little over it for two looks.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from halfbyte.errors import UsageError, in_words
from halfbyte.evals.judging.bounds import LEVEL
from halfbyte.evals.records import RunRecord
from halfbyte.evals.tasks.suite import BENCHMARKS
from halfbyte.files import MAX_TOKENIZER_BYTES, parse_json_text, read_bounded
from halfbyte.recipe.strict_yaml import parse_yaml, read_yaml_text

# With it a second look that nobody planned: 5 % and 1 % together are at most 6 %.
UNPLANNED_LEVEL = 0.01
MACRO = "macro"
MACRO_MARGIN = 0.01
_UNNAMED_MARGIN = 0.015

Origin = Literal["default", "flag", "file"]


@dataclass(frozen=True, slots=True)
class Margin:
    """The largest loss, in scores, that is still no regression, and where it came from."""

    value: float
    origin: Origin


@dataclass(frozen=True, slots=True)
class Look:
    """Which look at these arms a comparison is.

    planned     looks that were planned from the start; 1 if no second one was
    level       chance of a wrong GO that this look may spend
    next_level  the same for the next look; None if there may be none
    after       the earlier comparison's runs, baseline and candidate
    """

    number: int
    planned: int
    level: float
    next_level: float | None
    after: Sequence[str] = ()


def margin_of(name: str, given: Mapping[str, Margin]) -> Margin:
    """A benchmark's margin (or `MACRO`'s): the one given, else its default."""
    if name in given:
        return given[name]
    if name == MACRO:
        return Margin(MACRO_MARGIN, "default")
    return Margin(BENCHMARKS[name].margin if name in BENCHMARKS else _UNNAMED_MARGIN, "default")


def parse_margins(flags: Sequence[str], file: Path | None) -> dict[str, Margin]:
    """Margins of a YAML file (name: points) and of NAME=POINTS flags, which come last.

    Raises UsageError for what is no margin; `check_names` for names that are nobody's.
    """
    found: dict[str, Margin] = {}
    if file is not None:
        rows = parse_yaml(read_yaml_text(file, "margins"), f"margins {file}")
        if not isinstance(rows, dict):
            raise UsageError(f"{file}: expected lines of NAME: POINTS, such as ifbench: 1.0")
        for name, points in rows.items():
            found[str(name)] = Margin(_points(points, f"{file}: {name}"), "file")
    for text in flags:
        name, _, points = text.partition("=")
        found[name] = Margin(_points(points, f"--margin {text}"), "flag")
    return found


def _points(value: object, where: str) -> float:
    try:
        points = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        points = math.nan
    if isinstance(value, bool) or not 0 < points <= 100:
        raise UsageError(
            f"{where}: expected NAME=POINTS with more than 0 and at most 100 points, such as "
            "ifbench=1.0"
        )
    return points / 100


def check_names(margins: Mapping[str, Margin], known: Sequence[str]) -> None:
    """Raise UsageError for a margin whose benchmark neither run has."""
    unknown = [name for name in margins if name not in (*known, MACRO)]
    if unknown:
        raise UsageError(
            f"a margin is given for {', '.join(map(repr, unknown))}, which neither run has; "
            f"there are: {', '.join([*known, MACRO])}"
        )


def seed_shifts(b: RunRecord, c: RunRecord) -> list[int]:
    """The shift of seeds with which each arm was run."""
    return [int(run.settings.get("seed_shift", 0)) for run in (b, c)]


def first_look(planned: int) -> Look:
    """The first of so many planned looks. Raises UsageError for fewer than one."""
    if planned < 1:
        raise UsageError(f"--looks {planned}: at least one look is needed to see anything")
    level = LEVEL / planned
    return Look(1, planned, level, level if planned > 1 else UNPLANNED_LEVEL)


def next_look(
    file: Path, earlier: Mapping[str, Any], margins: Mapping[str, Margin], shifts: Sequence[int]
) -> Look:
    """The number of the look that follows the comparison in `file`.

    Raises UsageError where a further look would not be honest: after a verdict, with other margins,
    beyond the planned number, or unplanned with answers that were seen already.
    """
    look = earlier["look"]
    if earlier["verdict"] != "INCONCLUSIVE":
        raise UsageError(f"{file} ended {earlier['verdict']}; there is nothing left to look for")
    changed = [
        f"{name}: {100 * was:g} and {100 * margins[name].value:g}"
        for name, was in earlier["margins"].items()
        if name in margins and not math.isclose(was, margins[name].value)
    ]
    if changed:
        raise UsageError(
            f"{file} has other margins ({'; '.join(changed)}); a margin is not changed between "
            "looks"
        )
    number, planned = int(look["number"]) + 1, int(look["planned"])
    after = (earlier["baseline_run"], earlier["candidate_run"])
    if planned > 1:
        if number > planned:
            raise UsageError(f"{file}: was the last of {planned} planned looks")
        level = float(look["level"])
        return Look(number, planned, level, level if number < planned else None, after)
    if number > 2:
        raise UsageError(
            f"{file}: was a second look that nobody had planned; a third would be read as proof "
            "too easily. Plan the next comparison with --looks"
        )
    if seen := set(shifts) & set(earlier["seed_shifts"]):
        raise UsageError(
            f"{file}: has seen answers to these seeds (--seed-shift {min(seen)}). A second look "
            "that was not planned with --looks needs fresh repeats of both arms: run them with "
            "another --seed-shift and compare those alone"
        )
    return Look(number, planned, UNPLANNED_LEVEL, None, after)


def read_comparison(file: Path) -> dict[str, Any]:
    """An earlier comparison's JSON. Raises UsageError if it is none, or of an older version."""
    try:
        row = parse_json_text(read_bounded(file, MAX_TOKENIZER_BYTES).decode("utf-8"))
    except (OSError, ValueError, RecursionError) as failure:
        raise UsageError(f"{file} cannot be read as a comparison: {in_words(failure)}") from failure
    needed = ("look", "verdict", "margins", "seed_shifts", "baseline_run", "candidate_run")
    if not isinstance(row, dict) or any(name not in row for name in needed):
        raise UsageError(f"{file} is not what `halfbyte compare-evals --out` writes")
    return row
