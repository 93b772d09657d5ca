"""Which model a checkpoint was made from: what is claimed, against what its files know."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from halfbyte.card.facts import CheckpointFacts, count_parameters
from halfbyte.errors import UsageError
from halfbyte.files import read_bounded

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# A size in a name, such as 128B or 0.5B or 135M; 8x7B (experts) and A3B (active ones) say less.
_SIZE = re.compile(r"(?<![A-Za-z0-9.])(\d+(?:\.\d+)?)([BM])(?![A-Za-z0-9])", re.IGNORECASE)
# Names round, as 0.1B for 135 million.
_MOST_FACTOR = 1.5


@dataclass(frozen=True, slots=True)
class Base:
    """The base model's hub id, and what speaks for it as a sentence of the card."""

    name: str
    proof: str


def find_base(c: CheckpointFacts, claimed: str | None, folder: Path | None = None) -> Base | None:
    """The base model of a checkpoint; None if nobody says.

    claimed  hub id that the user gave
    folder   a copy of the base model; its config.json must be the one that was quantized

    Raises UsageError where the claim contradicts the manifest, the folder, or its own size.
    """
    origin, _, commit = str(c.made_of.get("origin") or "").partition("@")
    if claimed is None:
        if not origin:
            return None
        claimed = origin
    if not HUB_ID.fullmatch(claimed):
        raise UsageError(f"--base-model {claimed!r}: a hub id such as owner/name was expected")
    _check_size(c, claimed)
    if origin and origin != claimed:
        raise UsageError(
            f"--base-model {claimed}: the manifest says that this checkpoint was made from "
            f"{origin}@{commit}; leave --base-model out, or name that"
        )
    if folder is not None:
        _check_folder(c, claimed, folder)
    if origin:
        return Base(claimed, f"The manifest records commit {commit} of it as the source.")
    if folder is not None:
        return Base(claimed, "The configuration that was quantized was compared with a copy of it.")
    return Base(
        claimed,
        "This is what the publisher of this card states: the source was a local folder, which the "
        "manifest knows by the hashes of its files only.",
    )


def _check_size(c: CheckpointFacts, claimed: str) -> None:
    sizes = _SIZE.findall(claimed.partition("/")[2])
    if len(sizes) != 1:
        return  # none, or several that may mean anything
    said = float(sizes[0][0]) * {"b": 1e9, "m": 1e6}[sizes[0][1].lower()]
    found = count_parameters(c.config)
    if not said / _MOST_FACTOR <= found <= said * _MOST_FACTOR:
        text = c.config.text
        raise UsageError(
            f"--base-model {claimed}: the name says {sizes[0][0]}{sizes[0][1]} parameters, this "
            f"checkpoint has {found / 1e9:.3g}B ({text.num_layers} layers of width {text.width})"
        )


def _check_folder(c: CheckpointFacts, claimed: str, folder: Path) -> None:
    source = c.made_of.get("source")
    known = source if isinstance(source, dict) else {}
    shared = [name for name in ("config.json", "params.json") if name in known]
    if not shared:
        raise UsageError("--base-checkpoint: the manifest records no configuration to compare with")
    for name in shared:
        try:
            found = hashlib.sha256(read_bounded(folder / name)).hexdigest()
        except OSError as error:
            raise UsageError(f"--base-checkpoint {folder}: {name}: {error.strerror}") from error
        if found != known[name].get("sha256"):
            raise UsageError(
                f"--base-checkpoint {folder}: its {name} is not the one that was quantized; "
                f"{claimed} is another model, or another revision"
            )
