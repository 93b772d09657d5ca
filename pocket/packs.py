"""Batches of a fixed number of tokens, packed from items; each belongs to a seed.

Documents lie one behind another and never see each other; images likewise. A batch with a given
number is the same on every machine, so worker processes may make them in any order. One batch in
ten is long: it holds what needs thousands of tokens.

Shapes: T tokens of a batch, P patches, C values of a patch.
"""

import multiprocessing
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
from numpy.typing import NDArray

from pocket.encode import Encoded, Encoder
from pocket.items import Split
from pocket.mixture import AT_LENGTH, SHARES, item
from pocket.vocabulary import Vocabulary

LONG_EVERY = 6
LONG_KINDS = ("long_recall", *AT_LENGTH)


@dataclass(frozen=True, slots=True)
class Shape:
    """What a batch can hold; every size is fixed so that kernels are compiled once."""

    tokens: int
    documents: int
    document_tokens: int
    patches: int
    images: int


SHORT = Shape(65536, 512, 3072, 12288, 448)
LONG = Shape(65536, 48, 32768, 1024, 32)
# Room is kept for so many more sequences: what is left of a batch becomes padding of at most the
# longest length, because attention must reach every row.
_SPARE = 24
# The most patches of an image of 448 x 448 pixels.
IMAGE_PATCHES = 1024


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One flat batch.

    targets_T        the next token of the same document, where weights_T is not 0
    token_bounds     cumulative document lengths, padded with the last one
    patch_bounds     the same for images
    image_index_T    which merged patch a token is, where it is one; else -1
    kinds            of each document
    """

    is_long: bool
    tokens_T: NDArray[np.uint16]
    targets_T: NDArray[np.uint16]
    weights_T: NDArray[np.uint8]
    positions_T: NDArray[np.int32]
    image_index_T: NDArray[np.int32]
    token_bounds: NDArray[np.int32]
    patches_PC: NDArray[np.uint8]
    grid_P2: NDArray[np.uint8]
    patch_bounds: NDArray[np.int32]
    kinds: NDArray[np.str_]

    def save(self, path: Path) -> None:
        """Write the file; it appears when it is whole."""
        scratch = path.with_suffix(".part")
        with scratch.open("wb") as stream:
            np.savez(stream, **{name: getattr(self, name) for name in self.__slots__})
        scratch.rename(path)

    @staticmethod
    def load(path: Path) -> "Batch":
        """Read what `save` wrote."""
        with np.load(path) as file:
            fields = {name: file[name] for name in Batch.__slots__}
        fields["is_long"] = bool(fields["is_long"])
        return Batch(**fields)


class _Packer:
    """Fills one batch."""

    def __init__(self, shape: Shape, image_id: int, pad_id: int) -> None:
        self._shape = shape
        self._image_id = image_id
        self.tokens = np.full(shape.tokens, pad_id, np.uint16)
        self.targets = np.zeros(shape.tokens, np.uint16)
        self.weights = np.zeros(shape.tokens, np.uint8)
        self.positions = np.zeros(shape.tokens, np.int32)
        self.image_index = np.full(shape.tokens, -1, np.int32)
        self.bounds = [0]
        self.patch_bounds = [0]
        self.patches = np.zeros((shape.patches, 588), np.uint8)
        self.grid = np.zeros((shape.patches, 2), np.uint8)
        self.kinds: list[str] = []

    @property
    def room(self) -> int:
        """Tokens that are left."""
        return self._shape.tokens - self.bounds[-1]

    def fits(self, encoded: Encoded) -> bool:
        """Whether the document can be added."""
        length, shape = len(encoded.ids), self._shape
        num_patches = sum(len(image.patches_PC) for image in encoded.images)
        return (
            length <= min(self.room, shape.document_tokens)
            and len(self.kinds) < shape.documents - _SPARE
            and self.patch_bounds[-1] + num_patches <= shape.patches
            and len(self.patch_bounds) + len(encoded.images) < shape.images - _SPARE
        )

    def add(self, kind: str, encoded: Encoded) -> None:
        """Add a document that fits."""
        start, length = self.bounds[-1], len(encoded.ids)
        end = start + length
        ids = np.asarray(encoded.ids, np.uint16)
        self.tokens[start:end] = ids
        self.targets[start : end - 1] = ids[1:]
        self.weights[start : end - 1] = np.asarray(encoded.weights[1:], np.uint8)
        self.positions[start:end] = np.arange(length)
        if encoded.images:
            where = np.flatnonzero(ids == self._image_id)
            first = self.patch_bounds[-1] // 4
            self.image_index[start + where] = first + np.arange(len(where))
        for image in encoded.images:
            begin = self.patch_bounds[-1]
            stop = begin + len(image.patches_PC)
            self.patches[begin:stop] = image.patches_PC
            self.grid[begin:stop, 0] = image.rows_P
            self.grid[begin:stop, 1] = image.columns_P
            self.patch_bounds.append(stop)
        self.bounds.append(end)
        self.kinds.append(kind)

    def finish(self, *, is_long: bool) -> Batch:
        """The batch; what is left over is one document of padding."""
        shape = self._shape
        bounds = _padded(self.bounds, shape.tokens, shape.document_tokens, shape.documents)
        patch_bounds = _padded(self.patch_bounds, shape.patches, IMAGE_PATCHES, shape.images)
        return Batch(
            is_long,
            self.tokens,
            self.targets,
            self.weights,
            self.positions,
            self.image_index,
            bounds,
            self.patches,
            self.grid,
            patch_bounds,
            np.array(self.kinds),
        )


def _padded(bounds: list[int], total: int, longest: int, count: int) -> NDArray[np.int32]:
    """Bounds of `count` sequences that reach `total`, none longer than `longest`."""
    found = list(bounds)
    while found[-1] < total:
        found.append(min(total, found[-1] + longest))
    assert len(found) <= count + 1, f"{len(found) - 1} sequences in a batch of {count}"
    return np.array(found + [total] * (count + 1 - len(found)), np.int32)


def is_long(number: int) -> bool:
    """Whether a training batch is a long one."""
    return number % LONG_EVERY == LONG_EVERY - 1


def shares(*, long: bool, changed: Mapping[str, float] | None = None) -> dict[str, float]:
    """The kinds of a batch with their shares of its tokens; `changed` ones instead of the usual."""
    everything = {kind: share for kind, (_, share) in SHARES.items()} | dict(changed or {})
    return {k: share for k, share in everything.items() if (k in LONG_KINDS) is long and share > 0}


def training_batch(
    number: int,
    seed: int,
    encoder: Encoder,
    control: Mapping[str, int],
    short: Shape = SHORT,
    long: Shape = LONG,
    changed: Mapping[str, float] | None = None,
) -> Batch:
    """The batch of a number: always the kind that is furthest behind its share."""
    wanted = shares(long=is_long(number), changed=changed)
    shape = long if is_long(number) else short
    packer = _Packer(shape, control["[IMG]"], control["<pad>"])
    rng = Random(f"{seed}/{number}")
    used = dict.fromkeys(wanted, 0.0)
    misses = 0
    # A batch of nothing would have no loss; into a small one most long documents do not fit.
    while packer.room > 64 and misses < (12 if packer.kinds else 200):
        kind = min(wanted, key=lambda k: (used[k] + rng.random()) / wanted[k])
        encoded = encoder.encode(item(kind, rng.getrandbits(48), "train"))
        if packer.fits(encoded):
            packer.add(kind, encoded)
            used[kind] += len(encoded.ids)
        else:
            misses += 1
            # Whatever is full waits, so that the rest of the batch is filled with other kinds.
            used[kind] += shape.tokens / 50
    if not packer.kinds:
        raise ValueError(
            f"batch {number}: no document of {', '.join(wanted)} fits into {shape.tokens} tokens; "
            "make batches larger"
        )
    return packer.finish(is_long=is_long(number))


def held_out_batches(
    kind: str,
    numbers: Iterable[int],
    encoder: Encoder,
    control: Mapping[str, int],
    split: Split = "test",
    short: Shape = SHORT,
    long: Shape = LONG,
) -> Iterator[Batch]:
    """Held-out items of one kind, by their numbers, in as many batches as they fill.

    Documents are labelled with kind and effort; items longer than any batch takes are left out.
    """
    on_long = kind in LONG_KINDS
    shape = long if on_long else short
    packer = _Packer(shape, control["[IMG]"], control["<pad>"])
    for number in numbers:
        made = item(kind, number, split)
        encoded = encoder.encode(made)
        if not packer.fits(encoded):
            if packer.kinds:
                yield packer.finish(is_long=on_long)
            packer = _Packer(shape, control["[IMG]"], control["<pad>"])
        if packer.fits(encoded):
            packer.add(f"{kind}/{made.effort}", encoded)
    if packer.kinds:
        yield packer.finish(is_long=on_long)


def path_of(folder: Path, number: int) -> Path:
    """Where a batch is put."""
    return folder / f"{number:06d}.npz"


def _first_waiting(folder: Path, number: int) -> int:
    """The lowest batch that waits for the trainer; `number` itself if there is none."""
    return min((int(p.stem) for p in folder.glob("*.npz")), default=number)


def _work(
    tekken: Path,
    folder: Path,
    seed: int,
    worker: int,
    num_workers: int,
    start: int,
    most_ahead: int,
    short: Shape,
    long: Shape,
    changed: Mapping[str, float],
) -> None:
    vocabulary = Vocabulary(tekken)
    encoder = Encoder(vocabulary)
    number = start + worker
    parent = multiprocessing.parent_process()
    while True:
        # The trainer deletes what it has used up. Who makes the very batch that it waits for must
        # never wait in turn, however many later ones are there.
        while number > _first_waiting(folder, number) + most_ahead:
            time.sleep(0.2)
            if parent is None or not parent.is_alive():
                return
        batch = training_batch(number, seed, encoder, vocabulary.control, short, long, changed)
        batch.save(path_of(folder, number))
        number += num_workers


def start_workers(
    tekken: Path,
    folder: Path,
    *,
    seed: int,
    num_workers: int,
    start: int = 0,
    most_ahead: int = 2000,
    short: Shape = SHORT,
    long: Shape = LONG,
    changed: Mapping[str, float] | None = None,
) -> list[multiprocessing.Process]:
    """Processes that write batches from number `start` on; they end when the caller does."""
    context = multiprocessing.get_context("spawn")
    workers = []
    for worker in range(num_workers):
        arguments = (
            tekken,
            folder,
            seed,
            worker,
            num_workers,
            start,
            most_ahead,
            short,
            long,
            changed or {},
        )
        process = context.Process(target=_work, args=arguments, daemon=True)
        process.start()
        workers.append(process)
    return workers  # type: ignore[return-value]
