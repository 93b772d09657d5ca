"""Draws a blend: quota, selection, tokens, and the record of where each row came from.

`draw` is what `quantize` and the command line call. Nothing is padded, rows are ragged, and the
same blend over the same files and tokenizer gives the same rows, bit for bit. No torch.
"""

import hashlib
import heapq
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

import halfbyte
from halfbyte.calibrate.blend import Blend, Source, known_datasets
from halfbyte.calibrate.chat_text import ChatText, RefusedRowError, load_chat_text
from halfbyte.calibrate.overlap import NUM_WORDS, OverlapIndex
from halfbyte.calibrate.recombine import recombined_split
from halfbyte.calibrate.rows import BadRowError, Line, parse_line, parse_row
from halfbyte.calibrate.sources import DataAccess, OpenedSource, Split, SplitFile, open_source
from halfbyte.chat.prompt import EncodedImage
from halfbyte.errors import CheckpointError, UsageError
from halfbyte.log import logger, say_once

RowPictures = tuple[tuple[EncodedImage, ...], ...]  # of each row; empty for rows without any

# Broken rows up to this share of a split are tolerated; one is in any case: a download that was cut
# off ends in one.
_MAX_BAD_SHARE = 0.01
_NAMED_BAD_ROWS = 20  # as many are listed in the record


@dataclass(frozen=True, slots=True)
class CalibrationData:
    """Rows of token ids, and everything that is needed to draw them again.

    provenance  JSON values; written beside the checkpoint
    pictures    of each row; empty where no row has any. A row may end within a picture
    """

    rows: tuple[tuple[int, ...], ...]
    provenance: Mapping[str, Any]
    pictures: RowPictures = ()

    @property
    def num_tokens(self) -> int:
        """Number of tokens drawn; none of them is padding."""
        return sum(map(len, self.rows))


@dataclass(order=True, slots=True)
class _Candidate:
    """A row that may be taken; heaps put the one with the largest priority on top."""

    key: int  # minus the priority
    index: int
    ids: list[int] = field(compare=False)
    images: tuple[EncodedImage, ...] = field(compare=False)
    uuid: str | None = field(compare=False)
    digest: bytes = field(compare=False)
    cost: int = field(compare=False)


@dataclass(slots=True)
class _Reading:
    """What one pass over a split saw."""

    taken: list[_Candidate] = field(default_factory=list)
    num_read: int = 0
    bad: list[str] = field(default_factory=list)
    num_bad: int = 0
    num_empty: int = 0
    num_refused: int = 0
    refusal: str | None = None
    num_overlapping: int = 0
    read_sha256: str = ""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    is_exhausted: bool = False

    def note_bad(self, problem: str) -> None:
        self.num_bad += 1
        if len(self.bad) < _NAMED_BAD_ROWS:
            self.bad.append(problem)

    @property
    def cost(self) -> int:
        return sum(candidate.cost for candidate in self.taken)


def share_out(count: int, weights: Sequence[float]) -> list[int]:
    """Divide `count` by weights, whole numbers, largest remainder first.

    Equal weights give `divmod`: 1024 over seven is 147, 147, 146, 146, 146, 146, 146.
    """
    total = sum(weights)
    exact = [count * weight / total for weight in weights]
    shares = [int(value) for value in exact]
    by_remainder = sorted(range(len(weights)), key=lambda n: (round(shares[n] - exact[n], 9), n))
    for position in by_remainder[: count - sum(shares)]:
        shares[position] += 1
    return shares


def share_splits(count: int, num_splits: int) -> list[int]:
    """A member's rows over its splits: evenly, what is left over to the last.

    146 over eighteen is seventeen times 8 and 10. Source: Model Optimizer's quota rule.
    """
    base, rest = divmod(count, num_splits)
    return [*[base] * (num_splits - 1), base + rest]


def draw(
    blend: Blend,
    checkpoint: Path | str,
    *,
    access: DataAccess | None = None,
    evaluation_prompts: Iterable[str] = (),
) -> CalibrationData:
    """Draw the rows of `blend` in the tokens of a checkpoint directory.

    evaluation_prompts  rows that share 13 words in a row with any of them are left out

    A split that is too short hands its rest to the other splits of its source, then to the other
    sources; if all are, fewer rows come back and a warning says so. Raises UsageError for missing
    files and for sources without a usable row, CheckpointError for more than 1 % of broken rows,
    UnsupportedError if an optional package or the hub is needed.
    """
    text = load_chat_text(Path(checkpoint), blend.mode)
    return draw_rows(blend, text, access=access, evaluation_prompts=evaluation_prompts)


def draw_rows(
    blend: Blend,
    text: ChatText,
    *,
    access: DataAccess | None = None,
    evaluation_prompts: Iterable[str] = (),
) -> CalibrationData:
    """Draw rows as `draw` does, with a chat format that is already loaded."""
    overlap = OverlapIndex(evaluation_prompts)
    members = [
        _Member(source, open_source(source, blend, access or DataAccess()), blend, text, overlap)
        for source in blend.sources
    ]
    unit = blend.tokens_per_sample if blend.mode == "packed" else 1
    quotas = share_out(blend.samples, [source.weight for source in blend.sources])
    for member, quota in zip(members, quotas, strict=True):
        member.requested = quota
        member.take_more(quota * unit)
    _redistribute(members, blend.samples * unit)
    taken = _rows(members, blend)
    rows = [ids for ids, _ in taken]
    pictures: RowPictures = tuple(_within(ids, images) for ids, images in taken)
    if not any(pictures):
        pictures = ()
    if not rows:
        raise UsageError(f"blend {blend.name} gave no row of text")
    if len(rows) < blend.samples:
        logger.warning(
            "blend %s: %d rows instead of %d; the sources hold no more within the first %d rows",
            blend.name, len(rows), blend.samples, blend.window,
        )  # fmt: skip
    if any(source.builtin for source in blend.sources):
        say_once(
            "calibrating on the small text in the package: fine for trying things, too little for "
            "a checkpoint that others will use"
        )
    return CalibrationData(
        tuple(map(tuple, rows)),
        _provenance(blend, text, overlap, members, rows) | _seen(rows, pictures),
        pictures,
    )


def write_rows(data: CalibrationData, path: Path) -> None:
    """Rows as `batch{i}.input_ids`, int64 (1, tokens), in one safetensors file; the record beside.

    What `tokens.read_rows` reads; the record's name is the path with `.json` added. A file that is
    there is replaced. A picture is `batch{i}.picture{k}`, uint8 (3, height, width), and where its
    tokens begin and how many they are `batch{i}.place{k}`, int64 (2,).
    """
    rows: dict[str, np.ndarray[Any, Any]] = {
        f"batch{number}.input_ids": np.array([row], dtype=np.int64)
        for number, row in enumerate(data.rows)
    }
    for number, images in enumerate(data.pictures):
        for index, image in enumerate(images):
            place = np.array([image.offset, image.num_tokens], dtype=np.int64)
            rows[f"batch{number}.picture{index}"] = np.ascontiguousarray(image.pixels)
            rows[f"batch{number}.place{index}"] = place
    save_file(rows, path, metadata={"rows_sha256": data.provenance["rows_sha256"]})
    record = json.dumps(dict(data.provenance), ensure_ascii=False, indent=1)
    path.with_name(f"{path.name}.json").write_text(record + "\n", "utf-8")


def _redistribute(members: Sequence["_Member"], wanted: int) -> None:
    """Hand what short members lack to those that may have more, until none has."""
    while (missing := wanted - sum(member.taken_cost for member in members)) > 0:
        able = [member for member in members if member.can_give]
        if not able:
            return
        shares = share_out(missing, [member.source.weight for member in able])
        for member, share in zip(able, shares, strict=True):
            if share:
                member.take_more(share)


class _Member:
    """One source while it is being drawn from.

    Costs are rows, or tokens when documents are packed.
    """

    def __init__(
        self,
        source: Source,
        opened: OpenedSource,
        blend: Blend,
        text: ChatText,
        overlap: OverlapIndex,
    ) -> None:
        self.source = source
        self.opened = opened
        self.requested = 0
        self._blend = blend
        self._text = text
        self._overlap = overlap
        splits = opened.splits
        if source.recombine is not None:
            splits = (recombined_split(splits, source.recombine, blend.seed),)
        self.splits = splits
        self.readings = [_Reading() for _ in splits]

    @property
    def taken_cost(self) -> int:
        return sum(reading.cost for reading in self.readings)

    @property
    def can_give(self) -> bool:
        return not all(reading.is_exhausted for reading in self.readings)

    def take_more(self, count: int) -> None:
        """Take `count` beyond what is taken; splits that have less hand the rest to the others.

        Every turn a split gives what it is asked for or turns out to be exhausted.
        """
        wanted = self.taken_cost + count
        while (missing := wanted - self.taken_cost) > 0:
            able = [n for n, reading in enumerate(self.readings) if not reading.is_exhausted]
            if not able:
                return
            for number, share in zip(able, share_splits(missing, len(able)), strict=True):
                if share:
                    quota = self.readings[number].cost + share
                    self.readings[number] = self._read(self.splits[number], quota)

    def _read(self, split: Split, quota: int) -> _Reading:
        """One pass over the window of a split, keeping the `quota` of the smallest priorities.

        A larger quota keeps what a smaller one kept, and more.
        """
        reading = _Reading()
        heap: list[_Candidate] = []
        kept = 0
        digest = hashlib.sha256()
        is_first = self._blend.select == "first"
        # A file of one's own is blend, source and split under one name.
        names = dict.fromkeys((self._blend.name, self.source.label, split.name))
        where = f"blend {', '.join(names)}"
        for index, (file, line) in enumerate(split.lines()):
            if index >= self._blend.window or (is_first and kept >= quota):
                break
            digest.update(line.data)
            reading.num_read += 1
            reading.files.setdefault(
                file.name, {"name": file.name, "bytes": file.num_bytes, "sha256": file.sha256}
            )
            priority = (
                index
                if is_first
                else _priority(self._blend.seed, self.source.label, split.name, index)
            )
            is_wanted = kept < quota or -priority > heap[0].key
            candidate = self._candidate(line, file, index, priority, reading, is_wanted=is_wanted)
            if candidate is None:
                continue
            heapq.heappush(heap, candidate)
            kept += candidate.cost
            while kept - heap[0].cost >= quota:
                kept -= heapq.heappop(heap).cost
        _check_bad(reading, where)
        reading.read_sha256 = digest.hexdigest()
        reading.is_exhausted = kept < quota
        reading.taken = sorted(heap, reverse=True)
        if kept > quota:  # the last document is longer than what is left of the budget
            last = reading.taken[-1]
            last.cost -= kept - quota
            del last.ids[last.cost :]
        return reading

    def _candidate(
        self,
        line: Line,
        file: SplitFile,
        index: int,
        priority: int,
        reading: _Reading,
        *,
        is_wanted: bool,
    ) -> _Candidate | None:
        """The row as tokens if it can be taken; each is parsed so that bad ones are counted."""
        place = f"{file.name}:{line.number}"
        try:
            conversation = parse_row(parse_line(line))
        except BadRowError as error:
            reading.note_bad(f"{place}: {error}")
            return None
        if not is_wanted:
            return None
        if self._overlap.hits(conversation.strings()):
            reading.num_overlapping += 1
            return None
        try:
            encoded = self._text.encode(conversation, file.folder)
        except BadRowError as error:
            reading.note_bad(f"{place}: {error}")
            return None
        except RefusedRowError as error:
            reading.num_refused += 1
            reading.refusal = reading.refusal or f"{place}: {error}"
            return None
        ids = list(encoded.token_ids)
        if not ids:
            reading.num_empty += 1
            return None
        is_packed = self._blend.mode == "packed"
        ids = self._text.closed(ids) if is_packed else ids
        if not is_packed or encoded.images:
            ids = ids[: self._blend.tokens_per_sample]
        digest = hashlib.sha256(line.data).digest()
        cost = len(ids) if is_packed else 1
        uuid = conversation.uuid
        return _Candidate(-priority, index, ids, encoded.images, uuid, digest, cost)


def _priority(*parts: object) -> int:
    """A number as good as random that depends on nothing but the parts."""
    named = ":".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(named, digest_size=8).digest())


def _check_bad(reading: _Reading, where: str) -> None:
    if reading.num_bad > max(1, _MAX_BAD_SHARE * reading.num_read):
        raise CheckpointError(
            f"{where}: {reading.num_bad} of {reading.num_read} rows are broken, more than 1 %; "
            f"the first: {reading.bad[0]}"
        )
    for problem in reading.bad:
        say_once(f"{where}: left out {problem}")


_Row = tuple[Sequence[int], tuple[EncodedImage, ...]]


def _rows(members: Sequence[_Member], blend: Blend) -> list[_Row]:
    """Member by member, split by split; packed documents shuffled across all of them.

    A conversation with pictures is no document: it would be cut where serving cuts nothing.
    """
    taken = [
        (_priority(blend.seed, "pack", member.source.label, split.name, candidate.index), candidate)
        for member in members
        for split, reading in zip(member.splits, member.readings, strict=True)
        for candidate in reading.taken
    ]
    if blend.mode != "packed":
        return [(candidate.ids, candidate.images) for _, candidate in taken]
    shown: list[_Row] = [(one.ids, one.images) for _, one in taken if one.images]
    documents = sorted(pair for pair in taken if not pair[1].images)
    stream = [token for _, candidate in documents for token in candidate.ids]
    length = blend.tokens_per_sample
    if len(stream) < length:
        return [(stream, ()), *shown] if stream else shown
    cuts = range(0, len(stream) - length + 1, length)
    return [*((stream[start : start + length], ()) for start in cuts), *shown]


def _within(ids: Sequence[int], images: tuple[EncodedImage, ...]) -> tuple[EncodedImage, ...]:
    """The pictures that a row of these ids shows, the last one perhaps in part."""
    return tuple(
        replace(image, num_tokens=min(image.num_tokens, len(ids) - image.offset))
        for image in images
        if image.offset < len(ids)
    )


def _seen(rows: Sequence[Sequence[int]], pictures: RowPictures) -> dict[str, Any]:
    """What the record says of pictures; nothing where there are none."""
    images = [image for row in pictures for image in row]
    if not images:
        return {}
    return {
        "pictures": {
            "rows": sum(map(bool, pictures)),
            "pictures": len(images),
            "tokens": sum(image.num_tokens for image in images),
            "pixels_sha256": pixels_digest(pictures),
        }
    }


def pixels_digest(pictures: RowPictures) -> str:
    """SHA-256 over the pictures of all rows, their places and sizes included."""
    digest = hashlib.sha256()
    for number, images in enumerate(pictures):
        for image in images:
            place = (number, image.offset, image.num_tokens, *image.pixels.shape)
            digest.update(repr(place).encode())
            digest.update(np.ascontiguousarray(image.pixels).data)
    return digest.hexdigest()


def _provenance(
    blend: Blend,
    text: ChatText,
    overlap: OverlapIndex,
    members: Sequence[_Member],
    rows: Sequence[Sequence[int]],
) -> dict[str, Any]:
    return {
        "blend": blend.name,
        "mode": blend.mode,
        "select": blend.select,
        "window": blend.window,
        "seed": blend.seed,
        "samples": blend.samples,
        "tokens_per_sample": blend.tokens_per_sample,
        "tokenizer_sha256": text.tokenizer_sha256,
        "template_sha256": text.template_sha256,
        "num_rows": len(rows),
        "num_tokens": sum(map(len, rows)),
        "longest_row_tokens": max(map(len, rows)),
        "rows_sha256": _digest(json.dumps([list(row) for row in rows]).encode()),
        "overlap": {
            "words": NUM_WORDS,
            "prompts": overlap.num_prompts,
            "prompts_sha256": overlap.sha256,
        },
        "members": [_member_record(member) for member in members],
        "made_by": f"halfbyte {halfbyte.__version__}",
    }


def _member_record(member: _Member) -> dict[str, Any]:
    dataset = member.opened.dataset
    skipped = next((d.skipped for d in known_datasets().values() if d.id == dataset), {})
    taken = [candidate for reading in member.readings for candidate in reading.taken]
    return {
        "name": member.source.label,
        "origin": member.opened.origin,
        "dataset": dataset,
        "revision": member.opened.revision,
        "weight": member.source.weight,
        "requested_rows": member.requested,
        "taken_rows": len(taken),
        "num_tokens": sum(len(candidate.ids) for candidate in taken),
        "longest_row_tokens": max((len(candidate.ids) for candidate in taken), default=0),
        "splits_left_out": dict(skipped),
        "splits": [
            _split_record(split, reading)
            for split, reading in zip(member.splits, member.readings, strict=True)
            if reading.num_read
        ],
    }


def _split_record(split: Split, reading: _Reading) -> dict[str, Any]:
    """`rows` counts from 0 within the split, broken rows included; `read` hashes what was read."""
    return {
        "name": split.name,
        "files": list(reading.files.values()),
        "read": {"rows": reading.num_read, "sha256": reading.read_sha256},
        "rows": [candidate.index for candidate in reading.taken],
        "uuids": [candidate.uuid for candidate in reading.taken],
        "rows_sha256": _digest(b"".join(candidate.digest for candidate in reading.taken)),
        "num_tokens": sum(len(candidate.ids) for candidate in reading.taken),
        "broken": {"rows": reading.num_bad, "first": reading.bad},
        "empty": reading.num_empty,
        "overlapping": reading.num_overlapping,
        "refused_by_template": {"rows": reading.num_refused, "first": reading.refusal},
    }


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
