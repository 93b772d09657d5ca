"""A checkpoint named by its id on the hub, brought to this machine at one commit.

Only what a reader needs is fetched: a repository often holds the weights twice, in the hub's layout
and in Mistral's own. Files go into the hub's own download cache; what is there already is not
fetched again, and without a network a cached commit still opens. Called by `cli.quantize`.
"""

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from halfbyte.errors import CapacityError, CheckpointError, UsageError
from halfbyte.files import format_bytes, is_there
from halfbyte.hub import open_hub, refuse, whole_commit
from halfbyte.log import logger

# owner/name, or owner/name@revision: a commit, its beginning, a branch or a tag.
_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SMALL = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*")
_HUB_WEIGHTS, _NATIVE_WEIGHTS = "model*.safetensors", "consolidated*.safetensors"


@dataclass(frozen=True, slots=True)
class Located:
    """Where a checkpoint lies. `origin` is `owner/name@commit` if it came from the hub."""

    directory: Path
    origin: str | None = None


def locate(
    source: str,
    *,
    allow_hub: bool,
    cache: Path | None = None,
    endpoint: str | None = None,
) -> Located:
    """The directory of a source: a local one as it is, or a hub id fetched into the cache.

    source    a path, or `owner/name@revision`; a directory of that name comes first
    cache     None takes the hub's own default (HF_HOME)
    endpoint  another hub than the public one

    Raises UsageError for what is neither, UnsupportedError if the hub is needed and cannot be had,
    CheckpointError for a repository without weights that we read, CapacityError for a full disk.
    """
    directory = Path(source)
    if is_there(directory):
        return Located(directory)
    match = _ID.fullmatch(source)
    if match is None:
        raise CheckpointError(f"{source}: no such directory")
    if not allow_hub:
        raise UsageError(
            f"{source}: no such directory; if it is an id on the hub, --hub fetches it "
            "(name a revision too: owner/name@commit)"
        )
    return _fetch(match[1], match[2], cache, endpoint)


def _fetch(name: str, wanted: str | None, cache: Path | None, endpoint: str | None) -> Located:
    hub = open_hub(f"fetching {name}", endpoint)
    folder = Path(cache or hub.package.constants.HF_HUB_CACHE)
    try:
        commit = whole_commit(hub, name, wanted, "model", name)
        info = hub.api.model_info(name, revision=commit, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        chosen = choose_files(list(sizes), f"{name}@{commit[:12]}")
        _check_room(folder, name, commit, {file: sizes[file] for file in chosen})
        place = hub.package.snapshot_download(
            name, revision=commit, cache_dir=folder, endpoint=endpoint, allow_patterns=chosen
        )
    except hub.errors as error:
        if _COMMIT.fullmatch(wanted or "") and isinstance(error, hub.transport | OSError):
            cached = _cached(folder, name, str(wanted))
            if cached is not None:
                return Located(cached, f"{name}@{wanted}")
        refuse(
            f"{name} cannot be fetched from the hub",
            "Some models need a login and accepted terms; a local copy works without",
            error,
        )
    if wanted is None or not commit.startswith(wanted):
        logger.info(
            "%s is %s@%s today; name that commit to have the same again", name, name, commit
        )
    return Located(Path(place), f"{name}@{commit}")


def choose_files(names: Sequence[str], where: str) -> list[str]:
    """What to fetch of a repository: small files, and the weights in one layout, the hub's first.

    Raises CheckpointError if there are none.
    """
    here = [name for name in names if "/" not in name]
    weights = next(
        (
            found
            for pattern in (_HUB_WEIGHTS, _NATIVE_WEIGHTS)
            if (found := [name for name in here if fnmatchcase(name, pattern)])
        ),
        None,
    )
    if weights is None:
        raise CheckpointError(f"{where} holds no {_HUB_WEIGHTS} and no {_NATIVE_WEIGHTS}")
    small = [name for name in here if any(fnmatchcase(name, pattern) for pattern in _SMALL)]
    return sorted({*weights, *small})


def _check_room(folder: Path, name: str, commit: str, sizes: dict[str, int]) -> None:
    snapshot = _snapshot(folder, name, commit)
    needed = sum(size for file, size in sizes.items() if not (snapshot / file).exists())
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise CapacityError(
            f"{name}: {format_bytes(needed)} to fetch, {format_bytes(free)} free in {folder}; set "
            "HF_HOME to a larger disk"
        )
    if needed:
        logger.info("fetching %.2f GB of %s@%s into %s", needed / 1e9, name, commit[:12], folder)


def _snapshot(folder: Path, name: str, commit: str) -> Path:
    return folder / f"models--{name.replace('/', '--')}" / "snapshots" / commit


def _cached(folder: Path, name: str, commit: str) -> Path | None:
    """A commit that is in the cache with weights; whether they are whole is the reader's to say."""
    snapshot = _snapshot(folder, name, commit)
    if not snapshot.is_dir() or not any(snapshot.glob("*.safetensors")):
        return None
    logger.warning("the hub cannot be reached; taking %s from the cache", snapshot)
    return snapshot
