"""The answers of two runs to one benchmark, item by item, and what their scores say."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from halfbyte.evals.judging.comparison import Flip
from halfbyte.evals.judging.stats import mcnemar, paired_difference, sign_flip
from halfbyte.evals.records import GradedAttempt
from halfbyte.evals.tasks.suite import BENCHMARKS

Answers = dict[str, list[tuple[GradedAttempt, GradedAttempt]]]

_FLIPS_KEPT = 40


@dataclass(frozen=True)
class PairedAnswers:
    """Items that both arms answered in all repeats, in one order; scores are in [0, 1].

    answers      of the baseline and of the candidate, by item and repeat
    groups       of the items, where they share sources
    num_dropped  items that one arm lacks or that are not scored in every repeat
    is_drawn     repeats are answers of their own; else they are copies of one
    copied       arms that gave the same text in each repeat
    """

    answers: Answers
    groups: list[str] | None
    num_dropped: int
    is_drawn: bool
    copied: list[str]

    @cached_property
    def items(self) -> list[str]:
        """Names of the items, in the order of every other list here."""
        return sorted(self.answers)

    @cached_property
    def b_scores(self) -> list[list[float]]:
        """Scores of the baseline's answers, for each item one in each repeat."""
        return [[one.score or 0.0 for one, _ in self.answers[item]] for item in self.items]

    @cached_property
    def c_scores(self) -> list[list[float]]:
        """Scores of the candidate's answers, for each item one in each repeat."""
        return [[two.score or 0.0 for _, two in self.answers[item]] for item in self.items]

    @cached_property
    def b_means(self) -> list[float]:
        """The baseline's score of each item, a mean over repeats."""
        return [sum(scores) / len(scores) for scores in self.b_scores]

    @cached_property
    def c_means(self) -> list[float]:
        """The candidate's score of each item, a mean over repeats."""
        return [sum(scores) / len(scores) for scores in self.c_scores]

    @cached_property
    def changes(self) -> list[float]:
        """The candidate's score of each item less the baseline's."""
        return [y - x for x, y in zip(self.b_means, self.c_means, strict=True)]

    @property
    def repeats(self) -> int:
        """Number of answers to each item, copies included."""
        return min(len(scores) for scores in self.b_scores)

    @property
    def draws(self) -> int:
        """Number of answers to each item that are answers of their own."""
        return self.repeats if self.is_drawn else 1

    @property
    def lost(self) -> int:
        """Number of items whose score, a mean over repeats, fell."""
        return sum(change < 0 for change in self.changes)

    @property
    def won(self) -> int:
        """Number of items whose score, a mean over repeats, rose."""
        return sum(change > 0 for change in self.changes)

    def no_difference(self) -> tuple[str, float]:
        """The test of no difference that these answers allow, and its two-sided p value."""
        # Flips are independent only where neither repeats nor groups tie them together.
        is_alone = self.repeats == 1 and self.groups is None
        if is_alone and {*self.b_means, *self.c_means} <= {0.0, 1.0}:
            return "exact McNemar on flips", mcnemar(self.lost, self.won)
        return "sign-flip permutation", sign_flip(self.changes, self.groups)

    def by_stratum(self) -> dict[str, dict[str, float | None]]:
        """Differences by stratum; no interval where a stratum is a single group."""
        table: dict[str, list[int]] = {}
        for index, item in enumerate(self.items):
            first, _ = self.answers[item][0]
            table.setdefault(first.stratum, []).append(index)
        rows: dict[str, dict[str, float | None]] = {}
        for stratum, members in sorted(table.items()):
            values = [self.changes[i] for i in members]
            labels = None if self.groups is None else [self.groups[i] for i in members]
            e = paired_difference([0.0] * len(values), values, labels)
            is_known = e.num_groups > 1
            rows[stratum] = {
                "items": len(values),
                "difference": e.mean,
                "low": e.low if is_known else None,
                "high": e.high if is_known else None,
            }
        return rows

    def flips(self) -> list[Flip]:
        """The items that moved most, losses first, each with the first repeat that differs."""
        moved = [(d, i) for d, i in zip(self.changes, self.items, strict=True) if d != 0]
        flips = []
        for change, item in sorted(moved, key=lambda pair: (-abs(pair[0]), pair[0], pair[1])):
            one, two = next((x, y) for x, y in self.answers[item] if x.score != y.score)
            flips.append(
                Flip(
                    item, one.stratum, one.gold, change, one.extracted, two.extracted,
                    one.answer, two.answer,
                )
            )  # fmt: skip
        return flips[:_FLIPS_KEPT]


def pair_answers(
    name: str,
    b_records: Mapping[tuple[str, int], GradedAttempt],
    c_records: Mapping[tuple[str, int], GradedAttempt],
    *,
    draws_repeats: bool,
) -> PairedAnswers | None:
    """The answers of two runs to the benchmark of a name; None if they have no item in common.

    draws_repeats  repeats were drawn; at temperature 0 they are copies of one answer
    """
    pairs, num_dropped = _pairs(b_records, c_records)
    if not pairs:
        return None
    known = BENCHMARKS.get(name)
    groups = None
    if known is not None and known.has_groups:
        groups = [pairs[item][0][0].group for item in sorted(pairs)]
    copied = _copied(pairs)
    return PairedAnswers(pairs, groups, num_dropped, draws_repeats and not copied, copied)


def _pairs(
    b: Mapping[tuple[str, int], GradedAttempt], c: Mapping[tuple[str, int], GradedAttempt]
) -> tuple[Answers, int]:
    """Items present in both arms with all their repeats scored; how many were left out."""
    repeats = sorted({repeat for _, repeat in b} & {repeat for _, repeat in c})
    names = {item for item, _ in (*b, *c)}
    found: Answers = {}
    for name in names:
        row = [(b.get((name, r)), c.get((name, r))) for r in repeats]
        whole = [(x, y) for x, y in row if x and y and x.score is not None and y.score is not None]
        if repeats and len(whole) == len(repeats):
            found[name] = whole
    return found, len(names) - len(found)


def _copied(pairs: Answers) -> list[str]:
    """The arms in which all repeats of each item have the same text."""
    if any(len(row) < 2 for row in pairs.values()):
        return []
    return [
        arm
        for side, arm in enumerate(("baseline", "candidate"))
        if all(
            len({(row[side].reasoning, row[side].answer, row[side].score) for row in rows}) == 1
            for rows in pairs.values()
        )
    ]
