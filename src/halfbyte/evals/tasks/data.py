"""Where benchmark items come from: a folder of the user's, an installed data package, or the hub.

Looked for in that order; whichever is used is named in the run's record with its hash. Nothing is
downloaded behind the user's back: the hub is asked only through `datasets`, at a pinned revision.
"""

import codecs
import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from PIL import Image as Pixels

from halfbyte.errors import UsageError, in_words

# A document set of AA-LCR is one field of half a million characters.
_FIELD_LIMIT = 1 << 26


@dataclass(frozen=True, slots=True)
class Provenance:
    """Which data a run used, with hashes that identify it.

    source    hub id, package or folder name
    note      what a NOTE.txt beside the files says of them; printed wherever the score is
    revision  of the hub set or package; None where only the hashes say it
    sha256    file name -> hash of its bytes (for the hub: of the rows, canonically)
    checked   how far the items were compared with the published ones by content; "" if not at all
    """

    source: str
    revision: str | None
    sha256: Mapping[str, str]
    note: str = ""
    checked: str = ""


@dataclass(frozen=True, slots=True)
class DataRows:
    """Rows of a data set, as it names its columns, and where they came from."""

    rows: tuple[Mapping[str, Any], ...]
    provenance: Provenance
    folder: Path | None


@dataclass(frozen=True, slots=True)
class HubSet:
    """A data set on the hub. `revision` None: not pinned here, recorded by hash at run time."""

    path: str
    split: str
    revision: str | None
    config: str | None = None


@dataclass(frozen=True, slots=True)
class PackageFile:
    """A file inside an installed distribution that is used as data only, never imported."""

    distribution: str
    path: str


def load_rows(
    benchmark: str,
    data: Path | None,
    *,
    patterns: Sequence[str],
    package: Sequence[PackageFile] = (),
    hub: HubSet | None = None,
    columns: Sequence[str] = (),
    how: str = "",
) -> DataRows:
    """Load the rows of one benchmark from a folder, a package or the hub.

    data      folder of the user's, or None
    patterns  globs below `data`, tried in order; all files of the first that matches are read
    columns   names that every row must have
    how       what a user must do to get the set; part of the error when it is nowhere
    Raises UsageError with `how`.
    """
    if data is not None:
        for pattern in patterns:
            if files := sorted(data.glob(pattern)):
                place = files[0].resolve().parent
                rows = _from_files(files, f"{place.parent.name}/{place.name}", None, place)
                _check_columns(benchmark, files, rows.rows, columns)
                return rows
    if package and (files := _package_files(package)):
        name = package[0].distribution
        return _from_files(files, name, distribution(name).version, files[0].parent)
    if hub is not None and (found := _from_hub(hub)) is not None:
        return found
    looked = f"{data}/{patterns[0]}" if data is not None else "no --data folder given"
    raise UsageError(f"{benchmark}: its items were not found ({looked}). {how}")


def _check_columns(
    benchmark: str,
    files: Sequence[Path],
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
) -> None:
    where = ", ".join(str(file) for file in files)
    if not rows:
        raise UsageError(f"{benchmark}: {where} holds no items")
    for number, row in enumerate(rows, 1):
        if absent := [name for name in columns if row.get(name) is None]:
            raise UsageError(
                f"{benchmark}: item {number} of {where} has no {', '.join(absent)}; "
                f"it has {', '.join(map(str, row))}"
            )


def _package_files(wanted: Sequence[PackageFile]) -> list[Path]:
    try:
        found = [Path(str(distribution(f.distribution).locate_file(f.path))) for f in wanted]
    except PackageNotFoundError:
        return []
    return found if all(path.exists() for path in found) else []


def _from_files(files: Sequence[Path], source: str, revision: str | None, folder: Path) -> DataRows:
    rows: list[Mapping[str, Any]] = []
    for file in files:
        rows += _READERS[file.suffix](file)
    hashes = {file.name: file_sha256(file) for file in files}
    note = _note(folder)
    return DataRows(tuple(rows), Provenance(source, revision, hashes, note), folder)


def _note(folder: Path) -> str:
    """What whoever made the files says about them (NOTE.txt), such as that they are made up."""
    notes = [path for path in (folder / "NOTE.txt", folder.parent / "NOTE.txt") if path.exists()]
    return notes[0].read_text(encoding="utf-8").strip() if notes else ""


def _lines(file: Path) -> Iterator[str]:
    """Lines of a text file in UTF-8, with or without a byte order mark.

    Raises UsageError with the line if it is in another encoding.
    """
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if number == 1:
                if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise UsageError(f"{file} is in UTF-16; save it as UTF-8")
                line = line.removeprefix(codecs.BOM_UTF8)
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as failure:
                raise UsageError(
                    f"{file}, line {number}, byte {failure.start + 1}: not UTF-8 "
                    f"({line[failure.start : failure.start + 1]!r}); save the file as UTF-8"
                ) from failure


def _read_json_lines(file: Path) -> list[Mapping[str, Any]]:
    rows: list[Mapping[str, Any]] = []
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as failure:
            raise UsageError(f"{file}, line {number} is not JSON: {in_words(failure)}") from failure
        if not isinstance(row, dict):
            raise UsageError(f"{file}, line {number}: an item is an object, not {line[:40]!r}")
        rows.append(row)
    return rows


def _read_csv(file: Path) -> list[Mapping[str, Any]]:
    previous = csv.field_size_limit(_FIELD_LIMIT)
    reader = csv.DictReader(_lines(file))
    try:
        return list(reader)
    except csv.Error as failure:
        raise UsageError(
            f"{file}, line {reader.line_num} is not CSV: {in_words(failure)}"
        ) from failure
    finally:
        csv.field_size_limit(previous)


def _read_parquet(file: Path) -> list[Mapping[str, Any]]:
    # Optional dependency, comes with extra `eval` through `datasets`.
    from pyarrow import parquet

    try:
        return list(parquet.read_table(file).to_pylist())
    except (OSError, ValueError) as failure:  # ArrowInvalid is a ValueError
        raise UsageError(f"{file} is not Parquet: {str(failure)[:300]}") from failure


_READERS: dict[str, Callable[[Path], list[Mapping[str, Any]]]] = {
    ".jsonl": _read_json_lines,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _from_hub(hub: HubSet) -> DataRows | None:
    try:
        # Optional dependency, extra `eval`; and a second to import.
        from datasets import load_dataset
    except ImportError:
        return None
    try:
        table = load_dataset(hub.path, hub.config, split=hub.split, revision=hub.revision)
    except (OSError, ValueError, RuntimeError):
        # No network, gated without a login, or gone: the caller says how to get it.
        return None
    rows = tuple(table)
    name = "/".join(filter(None, (hub.path, hub.config, hub.split)))
    provenance = Provenance(name, hub.revision, {"rows": rows_sha256(rows)})
    return DataRows(rows, provenance, None)


def file_sha256(file: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal; links are followed."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def rows_sha256(rows: Iterable[Mapping[str, Any]]) -> str:
    """Hash of rows as canonical JSON; images and bytes count by their content."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=_content).encode())
    return digest.hexdigest()


def _content(value: Any) -> str:
    if isinstance(value, Pixels.Image):  # its repr would be an address
        return f"{value.mode} {value.size} {hashlib.sha256(value.tobytes()).hexdigest()}"
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    return repr(value)
