"""Whether items read from somebody's files are those that a set's authors published.

Hub sets and packages are pinned by revision and version. Files are compared by content: of each set
whose terms let us, hashes of published items stand in `published_items.json`, of some sets all, of
others a part (made by benchmarks/published_items.py). No item is part of this repository.
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

# Of items of which no hashes are known: their number alone would let any others pass for them.
NOT_COMPARED = "not compared by content with the published items"


class Published(NamedTuple):
    """What is known of a set: how many items it has, and hashes of some or all of them."""

    of: int
    items: frozenset[str]


def content_hash(*texts: object) -> str:
    """Hash of what an item says: its letters and digits, so that copies may be laid out otherwise.

    texts  what must be equal: question, options, right answer
    """
    digest = hashlib.sha256()
    for text in texts:
        digest.update("".join(c for c in str(text).casefold() if c.isalnum()).encode() + b"\0")
    return digest.hexdigest()[:_DIGITS]


@cache
def published(benchmark: str) -> Published | None:
    """What is known of a set; None of one whose items may not be read here."""
    text = (resources.files("halfbyte.evals.tasks") / "published_items.json").read_text("utf-8")
    found = json.loads(text).get(benchmark)
    return None if found is None else Published(found["of"], frozenset(found["items"]))


def compared(
    provenance: Provenance, benchmark: str, hashes: Sequence[str], *, full: int
) -> Provenance:
    """The provenance with what comparing found: a note where items are not the published ones.

    hashes  `content_hash` of every item that was read, before any limit; empty where nothing is
            known to compare with
    full    how many items the published set has
    Nothing is compared where a revision or version says which items these are.
    """
    if provenance.revision is not None:
        return provenance
    said, checked = _found(published(benchmark), hashes, full)
    note = "; ".join(filter(None, (provenance.note, said)))
    return replace(provenance, note=note, checked=checked)


def _found(known: Published | None, hashes: Sequence[str], full: int) -> tuple[str, str]:
    """What is wrong with the items, if anything; and how far they were compared."""
    read, count = set(hashes), len(hashes)
    if known is None:
        if count == full:
            return NOT_COMPARED, ""
        return f"{count} items, not the published {full}, and not compared with them", ""
    same = len(read & known.items)
    if len(known.items) == known.of:  # all are known, so that each item can be told
        if other := count - sum(digest in known.items for digest in hashes):
            return f"other than published: {other} of {count} items are not of the set", ""
        if same < full:
            return f"part of the published items: {same} of {full}", f"{same} of {full}"
        return "", f"all {full}"
    expected, told = len(known.items), f"{same} of {len(known.items)} known items"
    if same == 0:
        return f"other than published: none of {expected} known items is among these {count}", ""
    if count < full:
        return f"part of the published items: {count} of {full} ({told} found)", told
    if same < expected or count > full:
        return f"other than published: {count} items, of {full}, with {told}", ""
    return "", told
