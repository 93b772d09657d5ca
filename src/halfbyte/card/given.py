"""What a card is made of, as its sections read it."""

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from halfbyte.card.base import HUB_ID, Base
from halfbyte.card.facts import (
    Arm,
    CheckpointFacts,
    is_fidelity,
    speed_figures,
)
from halfbyte.card.markdown import Markdown, hub_link
from halfbyte.evals.judging.comparison import Comparison
from halfbyte.figures import Figure, Record

RECORDS = "evaluation"


NOT_MEASURED = "not measured"


UNMEASURED = Markdown(NOT_MEASURED.capitalize())


@dataclass(frozen=True, slots=True)
class CardInput:
    """Everything that a card is made of, as its sections read it.

    base        the base model and what speaks for it
    licence_name, licence_link  for the licence "other"
    languages   codes of ISO 639, as the base model's card states them
    contact     address of a page or a mailbox
    figures     records of `halfbyte bench` and `halfbyte compare --json`, by file name
    repository  hub id under which the card will stand; the metadata's links need it
    """

    checkpoint: CheckpointFacts
    arms: Sequence[Arm]
    comparison: Comparison | None
    base: Base | None = None
    title: str | None = None
    licence: str = "other"
    licence_name: str | None = None
    licence_link: str | None = None
    languages: Sequence[str] = ()
    contact: str | None = None
    release_date: str | None = None
    repository: str | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)


def record_names(arms: Sequence[Arm]) -> list[str]:
    """A file name for each arm's record: the arm's own name where that is one, else like it.

    Letters, digits, dots, hyphens and underscores of ASCII stay; all else becomes one hyphen, so
    that a name is never a path. Equal names are told apart by a number.
    """
    names: list[str] = []
    for arm in arms:
        plain = unicodedata.normalize("NFKD", arm.run.arm).encode("ascii", "ignore").decode()
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip(".-")[:80].rstrip(".-") or "arm"
        taken = {name.lower() for name in names}
        tries = [stem, *(f"{stem}-{number}" for number in range(2, len(arms) + 2))]
        names.append(next(f"{t}.run.json" for t in tries if f"{t}.run.json".lower() not in taken))
    return names


def candidate_of(given: CardInput) -> Arm | None:
    """The arm that the card is of; None without an evaluation."""
    return given.arms[-1] if given.arms else None


def record_path(given: CardInput, arm: Arm) -> str:
    """Where the card's folder holds the record of an arm."""
    names = dict(zip(map(id, given.arms), record_names(given.arms), strict=True))
    return f"{RECORDS}/{names[id(arm)]}"


def base_link(given: CardInput) -> Markdown:
    """The base model as a link, where the hub has it."""
    return hub_link(given.base.name) if given.base else Markdown("its source checkpoint")


def member_rows(c: CheckpointFacts) -> list[Mapping[str, Any]]:
    """Sources of the calibration blend, as the manifest records them."""
    provenance = (c.made_of.get("calibration") or {}).get("provenance") or {}
    return [m for m in provenance.get("members") or [] if isinstance(m, Mapping) and "dataset" in m]


def is_hub_id(name: object) -> bool:
    """Whether a name has the form of an id on the hub."""
    return isinstance(name, str) and HUB_ID.fullmatch(name) is not None


def speed_records(given: CardInput) -> Iterator[tuple[str, Record, list[Figure]]]:
    """File name, record and figures of every record of speed."""
    for name, raw in given.figures.items():
        if not is_fidelity(raw):
            record, figures = speed_figures(name, raw)
            if figures:
                yield name, record, figures
