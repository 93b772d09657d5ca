"""Whether items read from somebody's files are those that a set's authors published.

Hub sets and packages are pinned by revision and version. Files are compared by content: hashes of
the published items stand in `published_items.json` (made by benchmarks/published_items.py), and of
GPQA, whose items are kept private, the hash of the file that its authors publish. No item is part
of this repository.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib import resources
from typing import NamedTuple

from halfbyte.evals.tasks.data import Provenance

_DIGITS = 12

# Where neither items nor files are known: their number alone would let any others pass for them.
NOT_COMPARED = (
    "checked by number and form only, because the items of this set are kept private and the file "
    "is not the published one"
)

# Of so many items read, one may be corrected by its authors where corrections are expected.
_PER_CORRECTION = 50


class Published(NamedTuple):
    """What is known of a set: how many items it has, and hashes of them.

    of        how many items it has
    items     hashes of all of them; empty where the authors keep them private
    distinct  how many of them differ: some sets hold an item twice
    changing  at most so many items may read otherwise, as the authors go on correcting the set
    files     SHA-256 of files that hold the set, byte for byte as they are published
    """

    of: int
    items: frozenset[str]
    distinct: int
    changing: int = 0
    files: frozenset[str] = frozenset()


def content_hash(*texts: object) -> str:
    """Hash of what an item says: its letters and digits, so that copies may be laid out otherwise.

    texts  what must be equal: question, options, right answer
    """
    digest = hashlib.sha256()
    for text in texts:
        digest.update("".join(c for c in str(text).casefold() if c.isalnum()).encode() + b"\0")
    return digest.hexdigest()[:_DIGITS]


@cache
def published(benchmark: str) -> Published:
    """What is known of the set of a benchmark, as published with it.

    Raises KeyError for one of which nothing is.
    """
    text = (resources.files("halfbyte.evals.tasks") / "published_items.json").read_text("utf-8")
    found = json.loads(text)[benchmark]
    return Published(
        found["of"],
        frozenset(found["items"]),
        found["distinct"],
        found["changing"],
        frozenset(found["files"]),
    )


def compared(
    provenance: Provenance, benchmark: str | Published, hashes: Sequence[str]
) -> Provenance:
    """The provenance with what comparing found: a note where items are not the published ones.

    benchmark  the name of the set, or what is known of it
    hashes     `content_hash` of every item that was read, before any limit
    Nothing is compared where a revision or version says which items these are.
    """
    if provenance.revision is not None:
        return provenance
    known = published(benchmark) if isinstance(benchmark, str) else benchmark
    if provenance.sha256 and known.files.issuperset(provenance.sha256.values()):
        return replace(provenance, checked="the published file")
    said, checked = _by_number(known, hashes) if not known.items else _by_content(known, hashes)
    note = "; ".join(filter(None, (provenance.note, said)))
    return replace(provenance, note=note, checked=checked)


def _by_number(known: Published, hashes: Sequence[str]) -> tuple[str, str]:
    """What is to be said of items of which no hashes are known; never that they were compared."""
    count, different = len(hashes), len(set(hashes))
    if different < count:
        return f"other than published: {count} items, of which {different} differ", ""
    if count > known.of:
        return f"other than published: {count} items, not {known.of}", ""
    number = "" if count == known.of else f"{count} of {known.of} items, "
    return number + NOT_COMPARED, ""


def _by_content(known: Published, hashes: Sequence[str]) -> tuple[str, str]:
    """What is wrong with the items, if anything; and how far they are the published ones."""
    count, different = len(hashes), len(set(hashes))
    foreign = sum(digest not in known.items for digest in hashes)
    if foreign > min(known.changing, count // _PER_CORRECTION):
        return f"other than published: {foreign} of {count} items are not of the set", ""
    if count - different > known.of - known.distinct:
        return f"other than published: {count} items, of which {different} differ", ""
    if count > known.of:
        return f"other than published: {count} items, not {known.of}", ""
    same = count - foreign
    if count < known.of:
        return f"part of the published items: {same} of {known.of}", f"{same} of {known.of}"
    return "", f"all {known.of}" if same == known.of else f"{same} of {known.of}"
