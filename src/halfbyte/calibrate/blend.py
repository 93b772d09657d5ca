"""What to calibrate on: a YAML blend of sources, and the public data sets known by name.

A blend says which rows and how many; `draw` reads them and makes tokens. Needs no torch.
"""

from collections.abc import Mapping
from dataclasses import field
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from halfbyte.calibrate.rows import SUFFIXES, TEXT_SUFFIXES
from halfbyte.errors import UsageError, first_finding
from halfbyte.recipe.strict_yaml import parse_yaml, read_yaml_text

ReasoningMode = Literal["plain", "template", "packed"]
Select = Literal["first", "reservoir"]

_STRICT = ConfigDict(extra="forbid")
_MOST = 2**31 - 1
_Count = Annotated[int, Field(ge=1, le=_MOST, strict=True)]


@dataclass(frozen=True, slots=True, config=_STRICT)
class Dataset:
    """A public data set: `id` on the hub, and which of its splits are of use.

    revision  a commit or its beginning; None takes the newest and records it
    skipped   splits we know and leave out -> why
    """

    id: str
    splits: list[str]
    revision: str | None = None
    skipped: dict[str, str] = field(default_factory=dict)
    rows: int | None = None
    licence: str | None = None


@dataclass(frozen=True, slots=True, config=_STRICT)
class Source:
    """One member of a blend; exactly one of its six kinds of source is set.

    The kinds are dataset, path, builtin, tool_calls, pictures and drawn.

    dataset    a name of `datasets.yaml`, or a hub id, which then needs `splits`
    path       a file, a folder, or a pattern such as `rows/math__*.jsonl`; relative to the blend's
               own file. Each file is a split; its rows may name pictures that lie beside it
    tool_calls  the wheel of bfcl-eval or a folder it was unpacked into, relative to the blend's own
               file, or `installed`: what its ungraded rows ask, with their functions as tools
    pictures   a folder of pictures, about each of which `question` is asked; the answer stands in
               NAME.txt beside NAME.png, if there is one
    drawn      conversations about pictures that the package draws, by the blend's seed
    weight     share of the samples, relative to the other sources
    recombine  replace the rows by this many made of their pieces; for tests of volume only
    """

    dataset: str | None = None
    path: str | None = None
    builtin: Annotated[bool, Field(strict=True)] = False
    tool_calls: str | None = None
    pictures: str | None = None
    drawn: Annotated[bool, Field(strict=True)] = False
    question: str = "Describe this picture."
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    splits: list[str] | None = None
    revision: str | None = None
    recombine: _Count | None = None
    name: str | None = None

    @property
    def label(self) -> str:
        """The name under which messages and records speak of this source."""
        named = self.name or self.dataset or self.path or self.tool_calls or self.pictures
        return named or ("drawn" if self.drawn else "builtin")


@dataclass(frozen=True, slots=True, config=_STRICT)
class Blend:
    """Sources, how many rows of which length, and how they become text.

    mode     plain: contents joined by newlines; template: the model's chat template; packed: as
             template, documents joined by the end token and cut into full rows; a conversation with
             pictures stays a row of its own
    select   the first rows of a split, or a seeded sample of its first `window` rows
    folder   where relative paths start
    """

    name: str
    sources: Annotated[list[Source], Field(min_length=1)]
    samples: _Count = 1024
    tokens_per_sample: Annotated[int, Field(ge=2, le=_MOST, strict=True)] = 512
    seed: Annotated[int, Field(ge=0, le=_MOST, strict=True)] = 0
    mode: ReasoningMode = "template"
    select: Select = "reservoir"
    window: _Count = 10_000
    folder: Path = field(default=Path(), kw_only=True)


_BLEND = TypeAdapter(Blend)
_DATASETS = TypeAdapter(dict[str, Dataset])


def library_blends() -> tuple[str, ...]:
    """Names of the blends that come with the package."""
    folder = resources.files("halfbyte.calibrate") / "library"
    names = (entry.name for entry in folder.iterdir())
    return tuple(sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml")))


def known_datasets() -> Mapping[str, Dataset]:
    """Data sets that a blend may name without saying their splits."""
    text = (resources.files("halfbyte.calibrate") / "datasets.yaml").read_text("utf-8")
    return _DATASETS.validate_python(parse_yaml(text, "datasets.yaml"))


def load_blend(name_or_path: str | Path) -> Blend:
    """A blend of the library by name, a YAML file by path, or a file of rows or text by itself.

    Raises UsageError naming the file and the key at fault.
    """
    name = str(name_or_path)
    if name in library_blends():
        library = resources.files("halfbyte.calibrate") / "library"
        return parse_blend((library / f"{name}.yaml").read_text("utf-8"), name)
    path = Path(name_or_path)
    if path.name.endswith((*SUFFIXES, *TEXT_SUFFIXES)):
        return _of_file(path)
    if path.suffix not in (".yaml", ".yml"):
        known, kinds = ", ".join(library_blends()), ", ".join((*SUFFIXES, *TEXT_SUFFIXES))
        raise UsageError(
            f"there is no blend {name!r}; there are {known}; or give a .yaml file, or "
            f"your rows ({kinds})"
        )
    return parse_blend(read_yaml_text(path, "blend"), path.name, folder=path.parent)


def _of_file(path: Path) -> Blend:
    """A file as the only source: rows by the model's template, paragraphs packed into full rows."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    mode: ReasoningMode = "packed" if path.name.endswith(TEXT_SUFFIXES) else "template"
    return Blend(path.name, [Source(path=path.name)], mode=mode, folder=path.parent)


def parse_blend(text: str, where: str, *, folder: Path = Path()) -> Blend:
    """A blend from YAML text; `where` names it in messages. Raises UsageError."""
    raw = parse_yaml(text, f"blend {where}")
    if not isinstance(raw, dict) or "folder" in raw:
        raise UsageError(f"blend {where}: a mapping with name and sources was expected")
    try:
        blend = _BLEND.validate_python({**raw, "folder": folder})
    except ValidationError as error:
        raise UsageError(f"blend {where}: {first_finding(error)}") from error
    for number, source in enumerate(blend.sources, start=1):
        _check_source(source, f"blend {where}, source {number}")
    labels = [source.label for source in blend.sources]
    twice = [label for label in labels if labels.count(label) > 1]
    if twice:
        raise UsageError(f"blend {where}: two sources are called {twice[0]}; give one a name")
    return blend


def _check_source(source: Source, where: str) -> None:
    named = (source.dataset, source.path, source.tool_calls, source.pictures)
    if sum(name is not None for name in named) + source.builtin + source.drawn != 1:
        raise UsageError(
            f"{where}: say exactly one of dataset, path, pictures, tool_calls, builtin: true and "
            "drawn: true"
        )
    if source.dataset is None:
        if source.splits is not None or source.revision is not None:
            raise UsageError(f"{where}: splits and revision belong to a dataset")
        return
    resolve_dataset(source, where)


def resolve_dataset(source: Source, where: str) -> Dataset:
    """The data set that a source names, its splits and revision overridden where the source says.

    Raises UsageError for an unknown name and for a split that is not there or was left out.
    """
    assert source.dataset is not None
    known = known_datasets()
    if source.dataset in known:
        base = known[source.dataset]
        for split in source.splits or ():
            if split in base.skipped:
                raise UsageError(
                    f"{where}: split {split} is left out on purpose: {base.skipped[split]}"
                )
            if split not in base.splits:
                raise UsageError(
                    f"{where}: there is no split {split}; there are {', '.join(base.splits)}"
                )
        return Dataset(
            id=base.id,
            splits=source.splits or base.splits,
            revision=source.revision or base.revision,
            skipped=base.skipped,
            rows=base.rows,
            licence=base.licence,
        )
    if source.dataset.count("/") != 1 or not source.splits:
        raise UsageError(
            f"{where}: {source.dataset!r} is not one of {', '.join(known)}; a hub id (owner/name) "
            "also needs its splits"
        )
    return Dataset(id=source.dataset, splits=source.splits, revision=source.revision)
