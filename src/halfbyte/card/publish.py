"""What of a checkpoint folder goes to the hub, the way there, and whether it arrived.

Only known kinds of files go; every text among them is read for keys, hosts and paths first. A
repository begins private. A file is sent in a commit of its own and passed over when it is there
already, so that the same call goes on after an interruption.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from halfbyte.card.published import findings
from halfbyte.errors import CheckpointError, UnsupportedError, UsageError
from halfbyte.files import hash_regular, read_bounded
from halfbyte.hub import open_hub

_KINDS = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.md", "LICENSE*", "LICENCE*",
          "NOTICE*", "evaluation/*.json")  # fmt: skip
# Texts that people write or that quote them; vocabularies are full of what only looks like a path.
_READ = ("*.md", "*.txt", "evaluation/*.json", "halfbyte-manifest.json", "config.json",
         "generation_config.json", "hf_quant_config.json")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Parcel:
    """The files that would be sent to the hub, and where to.

    files     name in the repository -> file here, in the order of sending, weights first
    left_out  what stays -> why
    private   name of a file -> what it holds that should not be published
    """

    files: dict[str, Path]
    left_out: dict[str, str]
    private: dict[str, list[str]]

    @property
    def num_bytes(self) -> int:
        """Bytes of all files that would be sent."""
        return sum(path.stat().st_size for path in self.files.values())


def pack(folder: Path, card: Path | None = None) -> Parcel:
    """The files of a checkpoint folder, those of the folder `card` in place of its own.

    Raises UsageError if there is no README.md.
    """
    found: dict[str, Path] = {}
    left_out: dict[str, str] = {}
    for name, path in _below(folder):
        if path.is_symlink() and not path.resolve().is_file():
            left_out[name] = "a link to nothing that is a file"
        elif not any(fnmatchcase(name, kind) for kind in _KINDS) or name.count("/") > 1:
            left_out[name] = "not a file of a checkpoint or card"
        elif name.startswith("evaluation/") and card is not None:
            left_out[name] = "not of the card that was made now"
        else:
            found[name] = path
    if card is not None:
        written = {name: path for name, path in _below(card) if path.is_file()}
        left_out = {name: why for name, why in left_out.items() if name not in written}
        found |= written
    if "README.md" not in found:
        raise UsageError(f"{folder} has no README.md, and none was made")
    ordered = sorted(found, key=lambda name: (not name.endswith(".safetensors"), name))
    files = {name: found[name] for name in ordered}
    private = {
        name: said
        for name, path in files.items()
        if any(fnmatchcase(name, kind) for kind in _READ)
        and (said := findings(read_bounded(path).decode("utf-8", "replace")))
    }
    return Parcel(files, left_out, private)


def _below(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.iterdir()):
        if path.name == "evaluation" and path.is_dir() and not path.is_symlink():
            yield from ((f"evaluation/{inner.name}", inner) for inner in sorted(path.iterdir()))
        else:
            yield path.name, path


def send(
    parcel: Parcel,
    repository: str,
    *,
    public: bool,
    endpoint: str | None = None,
    say: Callable[[str], None],
) -> str:
    """Send every file and check what arrived; returns the address of the repository.

    public    make it public when everything has arrived; a new one is private until then
    endpoint  another hub than the public one

    Raises UsageError if a repository is public that should not be, UnsupportedError without
    huggingface_hub or if the hub refuses, CheckpointError if what arrived differs.
    """
    hub = open_hub("publishing", endpoint)
    api = hub.api
    refusals: tuple[type[Exception], ...] = (*hub.refusals, RuntimeError, ValueError)
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        if not public and not api.model_info(repository).private:
            raise UsageError(f"{repository} is public already; --public says that it may be")
        there = _arrived(api, repository, parcel)
        for number, (name, path) in enumerate(parcel.files.items(), 1):
            size = f"{path.stat().st_size:,} bytes"
            if there.get(name) == _fingerprint(path, there.get(name)):
                say(f"{number} of {len(parcel.files)}: {name} is there")
                continue
            say(f"{number} of {len(parcel.files)}: {name}, {size}")
            operation = hub.package.CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path))
            api.create_commit(repository, [operation], commit_message=f"Add {name}")
        there = _arrived(api, repository, parcel)
        wrong = [
            n for n, p in parcel.files.items() if there.get(n) != _fingerprint(p, there.get(n))
        ]
        if wrong:
            raise CheckpointError(
                f"{repository}: {', '.join(wrong[:5])} did not arrive as sent; give the same "
                "command again. The repository was not made public"
            )
        if public:
            api.update_repo_settings(repository, private=False)
    except refusals as error:
        # The client wraps what goes wrong while a large file is sent, and a card it refuses.
        said = " ".join(f"{error} {error.__cause__ or ''}".split())[:300]
        raise UnsupportedError(
            f"{repository}: the hub refused or was not reached ({said}); what has arrived stays, "
            "and the same command goes on. `hf auth login` brings a token"
        ) from error
    return f"{api.endpoint}/{repository}"


def _arrived(api: Any, repository: str, parcel: Parcel) -> dict[str, str]:
    """Name -> what the hub holds: sha256 of large files, git's own hash of small ones."""
    names: Sequence[str] = list(parcel.files)
    found = {}
    for start in range(0, len(names), 100):
        for one in api.get_paths_info(repository, names[start : start + 100]):
            lfs = getattr(one, "lfs", None)
            found[one.path] = f"sha256:{lfs.sha256}" if lfs is not None else f"git:{one.blob_id}"
    return found


def _fingerprint(path: Path, like: str | None) -> str | None:
    """The fingerprint of a file here, of the kind that the hub has; None where it has none."""
    if like is None:
        return "absent"
    if like.startswith("sha256:"):
        return f"sha256:{hash_regular(path)}"
    content = path.read_bytes()
    head = f"blob {len(content)}\0".encode()
    return f"git:{hashlib.sha1(head + content, usedforsecurity=False).hexdigest()}"
