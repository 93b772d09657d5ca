"""Where the rows of a blend's sources lie: local files, a folder laid out as on the hub, the hub,
the text in the package; and pictures, one's own or those that the package draws.

Finds files and opens them; what is in them is `rows`' business, which rows are taken is `draw`'s.
"""

import glob
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from halfbyte.bfcl import find_leaderboard, ungraded_rows
from halfbyte.calibrate.blend import Blend, Dataset, Source, resolve_dataset
from halfbyte.calibrate.documents import builtin_documents
from halfbyte.calibrate.drawn import NUM_DRAWN, drawn_messages
from halfbyte.calibrate.rows import (
    PICTURE_SUFFIXES,
    SUFFIXES,
    TEXT_SUFFIXES,
    Line,
    read_row_lines,
)
from halfbyte.errors import UsageError, in_words
from halfbyte.files import is_there, open_regular, read_bounded
from halfbyte.hub import open_hub, refuse, whole_commit
from halfbyte.log import logger

_STREAM_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class DataAccess:
    """From where the data sets of a blend may be read.

    folder      holds data sets laid out as on the hub (`owner/name/...`, `name/...`, or the hub's
                own download cache)
    allow_hub   fetch what the folder lacks; needs the package huggingface_hub
    endpoint    another hub than the public one
    """

    folder: Path | None = None
    allow_hub: bool = False
    endpoint: str | None = None


@dataclass(frozen=True, slots=True)
class SplitFile:
    """One file of a split. `sha256` is what the hub states; None for local files.

    folder  where the pictures lie that its rows name; None if they may name none
    """

    name: str
    num_bytes: int | None
    sha256: str | None
    open: Callable[[], BinaryIO]
    folder: Path | None = None


@dataclass(frozen=True, slots=True)
class Split:
    """A named list of files that are read one after the other."""

    name: str
    files: tuple[SplitFile, ...]

    def lines(self) -> Iterator[tuple[SplitFile, Line]]:
        """Every row of every file, in order; files are opened when their turn comes."""
        for file in self.files:
            with file.open() as stream:
                for line in read_row_lines(stream, file.name):
                    yield file, line


@dataclass(frozen=True, slots=True)
class OpenedSource:
    """A source found: its splits, and what the record says of where they came from."""

    splits: tuple[Split, ...]
    origin: str
    dataset: str | None = None
    revision: str | None = None


def open_source(source: Source, blend: Blend, access: DataAccess) -> OpenedSource:
    """Find the files of one source; no row is read yet.

    Raises UsageError if they are nowhere, UnsupportedError if the hub is needed and cannot be had.
    """
    where = f"blend {blend.name}, {source.label}"
    if source.builtin:
        return OpenedSource((_builtin_split(),), "package")
    if source.drawn:
        return OpenedSource((_drawn_split(blend.seed),), "drawn")
    if source.pictures is not None:
        split = _pictures_split(blend.folder / source.pictures, source.question, where)
        return OpenedSource((split,), "local")
    if source.path is not None:
        return OpenedSource(_local_splits(blend.folder / source.path, where), "local")
    if source.tool_calls is not None:
        return _tool_calls(source.tool_calls, blend.folder, where)
    dataset = resolve_dataset(source, where)
    if access.folder is not None:
        found = _folder_of(dataset, access.folder)
        if found is not None:
            return _from_folder(dataset, *found, where)
    if access.allow_hub:
        return _from_hub(dataset, access.endpoint, where)
    place = "is needed" if access.folder is None else f"is not under {access.folder}"
    raise UsageError(
        f"{where}: {dataset.id} {place}; name a folder that holds it, laid out as on the hub, or "
        "allow the hub"
    )


# --- the package


def _builtin_split() -> Split:
    rows = [{"uuid": name, "text": text} for name, text in builtin_documents()]
    return _split_of_rows("builtin", rows)


def _split_of_rows(name: str, rows: Sequence[object], folder: Path | None = None) -> Split:
    """Rows that are made here, as a file of JSON lines."""
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    file = SplitFile(f"{name}.jsonl", len(data), None, lambda: io.BytesIO(data), folder)
    return Split(name, (file,))


# --- pictures


def _drawn_split(seed: int) -> Split:
    rows = [
        {"uuid": f"drawn-{seed}-{number}", "messages": drawn_messages(seed, number)}
        for number in range(NUM_DRAWN)
    ]
    return _split_of_rows("drawn", rows)


# A caption is a few sentences.
_MAX_CAPTION_BYTES = 64 << 10


def _pictures_split(folder: Path, question: str, where: str) -> Split:
    """The picture files of a folder, each with a question, and an answer where one lies beside.

    `dog.txt` beside `dog.png` holds what is answered about it.
    """
    if not folder.is_dir():
        raise UsageError(f"{where}: {folder} is no folder of pictures")
    paths = [p for p in sorted(folder.rglob("*")) if p.name.lower().endswith(PICTURE_SUFFIXES)]
    rows = []
    for path in paths:
        name = path.relative_to(folder).as_posix()
        content = [{"type": "image", "image": name}, {"type": "text", "text": question}]
        messages: list[dict[str, object]] = [{"role": "user", "content": content}]
        beside = path.with_suffix(".txt")
        if is_there(beside):
            try:
                caption = read_bounded(beside, _MAX_CAPTION_BYTES).decode("utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise UsageError(
                    f"{where}: {beside}: no caption in UTF-8 ({in_words(error)})"
                ) from error
            messages.append({"role": "assistant", "content": caption})
        rows.append({"uuid": name, "messages": messages})
    if not rows:
        kinds = ", ".join(PICTURE_SUFFIXES)
        raise UsageError(f"{where}: {folder} holds no picture ({kinds})")
    return _split_of_rows("pictures", rows, folder)


# --- the leaderboard of tool calls


def _tool_calls(place: str, folder: Path, where: str) -> OpenedSource:
    """Rows that the leaderboard does not grade (`halfbyte.bfcl`); the graded ones never enter."""
    data = None if place == "installed" else folder / place
    if data is not None and not is_there(data):
        raise UsageError(f"{where}: {data}: there is no such wheel or folder")
    leaderboard = find_leaderboard(data)
    found = ungraded_rows(leaderboard)
    logger.info(
        "%s: %d rows of %s; %d that repeat what is graded are left out",
        where, len(found.rows), leaderboard.source, found.graded,
    )  # fmt: skip
    return OpenedSource((_split_of_rows("tool_calls", found.rows),), leaderboard.source)


# --- local files


def _local_splits(path: Path, where: str) -> tuple[Split, ...]:
    """A file, every readable file of a folder, or what a pattern finds; each file is a split."""
    if path.is_dir():
        paths = [p for p in sorted(path.rglob("*")) if p.is_file() and p.name.endswith(SUFFIXES)]
    elif is_there(path):
        paths = [path]
    else:
        paths = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    if not paths:
        raise UsageError(f"{where}: {path}: there is no such file, and no file in it or like it")
    # Texts are read where they are named; those of a folder are its README and licence.
    known = (*SUFFIXES, *TEXT_SUFFIXES)
    wrong = [p for p in paths if not p.name.endswith(known)]
    if wrong:
        raise UsageError(f"{where}: {wrong[0]} is not one of {', '.join(known)}")
    return tuple(Split(_stem(p.name), (_local_file(p, p.name),)) for p in paths)


def _local_file(path: Path, name: str) -> SplitFile:
    return SplitFile(name, path.stat().st_size, None, lambda: open_regular(path), path.parent)


def _stem(name: str) -> str:
    suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")
    return name.removesuffix(suffix)


# --- a folder laid out as on the hub


def _folder_of(dataset: Dataset, folder: Path) -> tuple[Path, str | None] | None:
    """Where a data set lies under `folder`, and its revision where the layout says it."""
    owner, name = dataset.id.split("/")
    for candidate in (folder / owner / name, folder / name):
        if candidate.is_dir():
            return candidate, None
    snapshots = folder / f"datasets--{owner}--{name}" / "snapshots"
    if not snapshots.is_dir():
        return None
    revisions = sorted(entry.name for entry in snapshots.iterdir())
    wanted = [r for r in revisions if dataset.revision is None or r.startswith(dataset.revision)]
    if not wanted:
        raise UsageError(
            f"{snapshots} holds {', '.join(revisions)}, but the blend is pinned to revision "
            f"{dataset.revision}"
        )
    main = snapshots.parent / "refs" / "main"
    newest = main.read_text("utf-8").strip() if is_there(main) else wanted[-1]
    revision = newest if newest in wanted else wanted[-1]
    return snapshots / revision, revision


def _from_folder(dataset: Dataset, folder: Path, revision: str | None, where: str) -> OpenedSource:
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    splits = tuple(
        Split(split, tuple(_local_file(folder / name, name) for name in chosen))
        for split, chosen in _choose(dataset, names, f"{where}: {folder}")
    )
    return OpenedSource(splits, "folder", dataset.id, revision)


def _choose(dataset: Dataset, names: Sequence[str], where: str) -> Iterator[tuple[str, list[str]]]:
    """The files of each split: `SPLIT.jsonl`, `SPLIT-00000-of-00003.parquet`, `SPLIT/....jsonl`.

    If a split is there in several kinds of file, the first kind of SUFFIXES is taken.
    """
    for split in dataset.splits:
        shard = re.compile(rf"{re.escape(split)}(-\d+-of-\d+)?")
        fitting = [
            name
            for name in names
            if name.endswith(SUFFIXES)
            and (shard.fullmatch(_stem(Path(name).name)) or split in Path(name).parts[:-1])
        ]
        kinds = [[name for name in fitting if name.endswith(suffix)] for suffix in SUFFIXES]
        chosen = next((kind for kind in kinds if kind), None)
        if chosen is None:
            raise UsageError(
                f"{where}: there is no {split}.jsonl (or .jsonl.gz, .parquet) for this split"
            )
        yield split, chosen


# --- the hub


class _Stream(io.RawIOBase):
    """A remote file as a raw stream, so that the standard buffer can look for ends of lines."""

    def __init__(self, remote: Any, where: str, errors: tuple[type[Exception], ...]) -> None:
        self._remote = remote
        self._where = where
        self._errors = errors

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data: bytes = self._remote.read(len(buffer))
        except self._errors as error:
            _refuse_hub(self._where, error)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._remote.close()
        super().close()


def _from_hub(dataset: Dataset, endpoint: str | None, where: str) -> OpenedSource:
    """Splits that are streamed from the hub at one commit; nothing is kept on disk."""
    hub = open_hub(f"{where}: fetching {dataset.id}", endpoint)
    errors = hub.errors
    place = f"{where}: {dataset.id} on the hub"
    try:
        revision = whole_commit(hub, dataset.id, dataset.revision, "dataset", place, "the pinned ")
        info = hub.api.dataset_info(dataset.id, revision=revision, files_metadata=True)
    except errors as error:
        _refuse_hub(place, error)
    files = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    system = hub.package.HfFileSystem(endpoint=endpoint, skip_instance_cache=True)

    def remote_file(name: str) -> SplitFile:
        sibling = files[name]
        url = f"datasets/{dataset.id}@{revision}/{name}"

        def open_remote() -> BinaryIO:
            try:
                if name.endswith(".parquet"):  # read at offsets, not from the start
                    remote: BinaryIO = system.open(url, "rb")
                    return remote
                stream = _Stream(system.open(url, "rb", block_size=0), f"{place}: {name}", errors)
                return io.BufferedReader(stream, _STREAM_BUFFER_BYTES)
            except errors as error:
                _refuse_hub(f"{place}: {name}", error)

        sha256 = sibling.lfs.sha256 if sibling.lfs is not None else None
        return SplitFile(name, sibling.size, sha256, open_remote)

    splits = tuple(
        Split(split, tuple(remote_file(name) for name in chosen))
        for split, chosen in _choose(dataset, sorted(files), place)
    )
    return OpenedSource(splits, "hub", dataset.id, revision)


def _refuse_hub(place: str, error: Exception) -> NoReturn:
    advice = (
        "Some data sets need a login and accepted terms; a local copy laid out as on the hub works "
        "without"
    )
    refuse(f"{place} cannot be read", advice, error)
