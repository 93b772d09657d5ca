"""What a source is, told from as little as its config: nothing is downloaded, no tensor is needed.

A whole checkpoint is opened as always. A folder that holds only what is small on the hub (the
config, the index, shards cut off after their headers) is read as far as it goes, and every fact
says where it comes from. Called by `capacity`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from halfbyte.checkpoint.fields import MULTIMODAL_TYPES
from halfbyte.checkpoint.inventory import expected_tensors
from halfbyte.checkpoint.metadata import Quantization, is_native, read_config_in, read_json
from halfbyte.checkpoint.names import Layout, canonical_name, detect_layout, foreign_name
from halfbyte.checkpoint.reader import IGNORED_TENSORS, Checkpoint
from halfbyte.checkpoint.shards import StoredTensor, read_header, read_weight_map
from halfbyte.config import ModelConfig
from halfbyte.errors import CheckpointError
from halfbyte.files import is_there, require_directory


@dataclass(frozen=True, slots=True)
class Survey:
    """What is known of a source, which may lack its tensors or more.

    checkpoint     None if the weights are not (all) there
    num_bytes      of all tensors: as stated if that fits the config's shapes, else by those
    stated_bytes   what headers or index say; None if there are none
    basis          which files these facts come from
    """

    directory: Path
    config: ModelConfig
    quantization: Quantization
    checkpoint: Checkpoint | None
    num_bytes: int
    num_tensors: int
    stated_bytes: int | None
    basis: str


def survey(path: str | Path) -> Survey:
    """Find out what `path` holds. Raises CheckpointError if that contradicts itself."""
    directory = Path(path)
    require_directory(directory)
    if _is_whole(directory):
        checkpoint = Checkpoint.open(directory)
        stored = sum(map(checkpoint.num_bytes, checkpoint.names()))
        return _survey(
            directory, checkpoint.config, checkpoint.quantization, stored, "the weights", checkpoint
        )
    headers = _headers(directory)
    if headers:
        config, quantization = _describe(directory, headers)
        _compare(headers, config, quantization, "the headers")
        stated = sum(num_bytes for num_bytes in headers.values() if num_bytes is not None)
        return _survey(directory, config, quantization, stated, "config and headers")
    weight_map, total = _index(directory)
    if weight_map:
        config, quantization = _describe(directory, weight_map)
        _compare(weight_map, config, quantization, "the index")
        return _survey(directory, config, quantization, total, "config and index")
    config, quantization = _described(directory)
    return _survey(directory, config, quantization, None, "the config alone")


def _survey(
    directory: Path,
    config: ModelConfig,
    quantization: Quantization,
    stated: int | None,
    basis: str,
    checkpoint: Checkpoint | None = None,
) -> Survey:
    expected = expected_tensors(config, quantization).values()
    # Scalars of an FP8 source may be stored in either of two widths.
    least, most = (
        sum(prod(want.shape) * pick(d.itemsize for d in want.dtypes) for want in expected)
        for pick in (min, max)
    )
    is_as_described = stated is not None and least <= stated <= most
    return Survey(
        directory=directory,
        config=config,
        quantization=quantization,
        checkpoint=checkpoint,
        num_bytes=stated if stated is not None and is_as_described else least,
        num_tensors=len(expected),
        stated_bytes=stated,
        basis=basis,
    )


def _described(directory: Path) -> tuple[ModelConfig, Quantization]:
    """Read the architecture from the config alone, without a single tensor name."""
    if _is_native(directory):
        layout: Layout = "mistral"
    else:
        kind = read_json(directory / "config.json").get("model_type")
        layout = "hf" if kind in MULTIMODAL_TYPES else "hf-text"
    config, quantization, _ = read_config_in(directory, layout, has_head=None)
    return config, quantization


def _is_native(directory: Path) -> bool:
    """Whether the layout is Mistral's; with both configs and no weights it counts as the hub's."""
    is_described = is_there(directory / "config.json")
    return is_native(directory) and not (is_described and not any(directory.glob("consolidated*")))


def _stem(directory: Path) -> str:
    return "consolidated" if _is_native(directory) else "model"


def _index(directory: Path) -> tuple[Mapping[str, str], int | None]:
    """Names and stated size of the index; nothing if there is none."""
    path = directory / f"{_stem(directory)}.safetensors.index.json"
    if not is_there(path):
        return {}, None
    metadata = read_json(path).get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return read_weight_map(path), total if type(total) is int else None


def _is_whole(directory: Path) -> bool:
    """Whether every shard is there in full length, as its own header measures it.

    Shards that are damaged otherwise count as there, so that opening them says what is wrong.
    """
    files = list(directory.glob(f"{_stem(directory)}*.safetensors"))
    weight_map, _ = _index(directory)
    promised = {directory / shard for shard in weight_map.values()}
    if not files or not promised <= set(files):
        return False
    for path in files:
        tensors = _header(path).values()
        if path.stat().st_size < max((x.offset + x.num_bytes for x in tensors), default=0):
            return False
    return True


def _header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, which may end after its header."""
    return read_header(path, needs_data=False)[0]


def _headers(directory: Path) -> dict[str, int | None]:
    """Foreign name -> bytes from the headers of all shards; empty unless every shard has one."""
    files = sorted(directory.glob(f"{_stem(directory)}*.safetensors"))
    weight_map, _ = _index(directory)
    if not files or not set(weight_map.values()) <= {path.name for path in files}:
        return {}
    return {name: stored.num_bytes for path in files for name, stored in _header(path).items()}


def _describe(directory: Path, names: Mapping[str, Any]) -> tuple[ModelConfig, Quantization]:
    layout = detect_layout(names)
    has_head = foreign_name("head.weight", layout, "none") in names
    config, quantization, _ = read_config_in(directory, layout, has_head=has_head)
    return config, quantization


def _compare(
    names: Mapping[str, Any], config: ModelConfig, quantization: Quantization, where: str
) -> None:
    """Names must be those that the config asks for, no more and no fewer."""
    layout = detect_layout(names)
    expected = set(expected_tensors(config, quantization))
    found = set()
    for foreign in names:
        if any(pattern.fullmatch(foreign) for pattern, _ in IGNORED_TENSORS):
            continue
        name = canonical_name(foreign, layout, quantization.dialect)
        if name not in expected:
            raise CheckpointError(f"{where}: {foreign} has no place in the model of the config")
        found.add(name)
    missing = sorted(expected - found)
    if missing:
        first = foreign_name(missing[0], layout, quantization.dialect)
        more = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise CheckpointError(f"{where} lack {first}{more}, which the config asks for")
