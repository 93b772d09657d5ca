"""A checkpoint directory as canonical tensors: opened strictly, read lazily.

`Checkpoint.open` reads headers and JSON only, maps every stored tensor to its canonical name and
proves that nothing is missing, left over, or of another shape or type than the config promises.
Tensors are read when asked for, whole or by rows or columns (a tensor-parallel rank reads only its
share), always into memory of their own.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from halfbyte.checkpoint.inventory import Expected, expected_eagle_tensors, expected_tensors
from halfbyte.checkpoint.metadata import Quantization, is_native, read_config_in
from halfbyte.checkpoint.names import (
    Layout,
    canonical_name,
    detect_layout,
    foreign_name,
    native_to_hub_rows,
    rotary_heads,
)
from halfbyte.checkpoint.shards import (
    StoredTensor,
    read_columns,
    read_rows,
    read_whole,
    scan,
)
from halfbyte.checkpoint.written_metadata import hub_config
from halfbyte.config import ModelConfig
from halfbyte.errors import CheckpointError, FormatError
from halfbyte.files import require_directory
from halfbyte.formats.fp8 import decode_fp8
from halfbyte.formats.nvfp4 import EncodedNVFP4, decode_nvfp4
from halfbyte.modules import WeightFormat, eagle_fuse

# Stored tensors that we leave alone, by foreign name, and why.
IGNORED_TENSORS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r".*\.rotary_emb\.inv_freq"), "computed from the config"),
    (
        re.compile(r".*fake_quantizer.*"),
        "KV scales of native files; every converter drops them, ours are measured",
    ),
)


class Checkpoint:
    """One checkpoint directory, read-only; two of them may be open at once.

    Make it with `open`. Names are canonical throughout (see `halfbyte.modules`); in Mistral's FP8
    dialect the role weight_scale is read from weight_scale_inv and input_scale from
    activation_scale. q and k of native files come back in hub row order.
    """

    def __init__(
        self,
        directory: Path,
        config: ModelConfig,
        quantization: Quantization,
        raw_config: Mapping[str, Any],
        layout: Layout,
        stored: dict[str, StoredTensor],
        ignored: dict[str, str],
    ) -> None:
        self.directory = directory
        self.config = config
        self.quantization = quantization
        self.raw_config = MappingProxyType(dict(raw_config))
        self.layout: Layout = layout
        self.ignored = MappingProxyType(ignored)
        self._stored = stored

    @classmethod
    def open(cls, path: str | Path, *, any_float: bool = False) -> "Checkpoint":
        """Open a directory in any dialect and layout.

        any_float   take f32 and f16 where the model has bf16: for `convert`, nobody else reads them

        Raises CheckpointError for a damaged or missing shard, an unknown config field, a tensor
        that is missing, unknown, or of another shape or dtype than the config says; the message
        names file and tensor.
        """
        directory = Path(path)
        require_directory(directory)
        files = scan(directory, native=is_native(directory))
        layout = detect_layout(files)
        has_head = foreign_name("head.weight", layout, "none") in files
        config, quantization, raw = read_config_in(directory, layout, has_head=has_head)
        stored, ignored = _map_names(files, layout, quantization)
        expected = expected_tensors(config, quantization)
        if any_float:
            expected = {name: _as_any_float(want) for name, want in expected.items()}
        _compare(stored, expected, layout, quantization)
        return cls(directory, config, quantization, raw, layout, stored, ignored)

    def without_vision(self) -> "Checkpoint":
        """The text model alone, as a text-only checkpoint in the hub's spelling would say it.

        Tensors are read from where they lie. Raises CheckpointError if there is no vision tower.
        """
        if self.config.vision is None:
            raise CheckpointError(f"{self.directory} has no vision tower to leave out")
        config = replace(self.config, vision=None)
        stored = {
            name: tensor
            for name, tensor in self._stored.items()
            if not name.startswith(("encoder.", "projector."))
        }
        layout: Layout = "mistral" if self.layout == "mistral" else "hf-text"
        return Checkpoint(
            self.directory,
            config,
            self.quantization,
            hub_config(config),
            layout,
            stored,
            dict(self.ignored),
        )

    @classmethod
    def open_eagle(cls, path: str | Path) -> "Checkpoint":
        """Open an EAGLE draft model in Mistral's layout (docs/formats.md), as strictly as `open`.

        An embedding or a head beside it is left alone: it shares its target's.
        """
        directory = Path(path)
        require_directory(directory)
        if not (directory / "params.json").is_file():
            raise CheckpointError(
                f"{directory} has no params.json, so it is not an EAGLE head in Mistral's layout"
            )
        files = scan(directory, native=True)
        fuse = foreign_name("eagle.fuse.weight", "mistral", "none")
        if fuse not in files:
            raise CheckpointError(
                f"{directory} has no {fuse} among {len(files)} tensors, so it is not an EAGLE head"
            )
        config, quantization, raw = read_config_in(directory, "mistral", has_head=True)
        config = replace(config, vision=None)
        formats = dict(quantization.formats)
        if files[fuse].dtype == torch.float8_e4m3fn:
            formats[eagle_fuse(config).name] = "fp8"
        else:
            formats[eagle_fuse(config).name] = "bf16"
        quantization = replace(quantization, formats=formats)
        stored, ignored = _map_names(files, "mistral", quantization)
        for name in ("embedding.weight", "head.weight"):
            if (shared := stored.pop(name, None)) is not None:
                ignored[shared.name] = "a draft model uses its target's"
        expected = expected_eagle_tensors(config, quantization)
        _compare(stored, expected, "mistral", quantization)
        return cls(directory, config, quantization, raw, "mistral", stored, ignored)

    def names(self) -> tuple[str, ...]:
        """Canonical names of all tensors, in model order."""
        return tuple(self._stored)

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape as stored; a one-element scalar counts as 0-d."""
        return self._shape(self._find(name))

    def dtype(self, name: str) -> torch.dtype:
        """The stored dtype: e4m3 codes are float8_e4m3fn, packed e2m1 codes uint8."""
        return self._find(name).dtype

    def num_bytes(self, name: str) -> int:
        """Bytes that one tensor takes in its file."""
        return self._find(name).num_bytes

    def foreign(self, name: str) -> str:
        """The name under which the files store canonical `name`."""
        return self._find(name).name

    def shard(self, name: str) -> Path:
        """Path of the file that holds canonical tensor `name`."""
        return self._find(name).path

    def stored(self, name: str) -> StoredTensor:
        """Where the bytes of `name` lie, for callers that read them as they are."""
        return self._find(name)

    def tensor(self, name: str) -> Tensor:
        """The tensor as stored, on the CPU, in memory of its own (may be written to)."""
        stored = self._find(name)
        tensor = read_whole(stored).reshape(self._shape(stored))
        heads = self._native_heads(name, stored)
        return tensor if heads is None else native_to_hub_rows(tensor, heads)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the first axis; reads only their bytes.

        For q and k of native files, whole heads around the range are read and put in hub order.
        """
        stored = self._find(name)
        heads = self._native_heads(name, stored)
        if heads is None:
            return read_rows(stored, start, stop)
        head_dim = stored.shape[0] // heads
        first, last = start // head_dim, -(-stop // head_dim)
        part = read_rows(stored, first * head_dim, last * head_dim)
        if first == last:
            return part
        offset = first * head_dim
        return native_to_hub_rows(part, last - first)[start - offset : stop - offset].clone()

    def columns(self, name: str, start: int, stop: int) -> Tensor:
        """Columns [start, stop) of the second axis, as a tensor of its own.

        Columns are counted as stored: a packed NVFP4 weight has one per two inputs, its
        weight_scale one per 16.
        """
        stored = self._find(name)
        part = read_columns(stored, start, stop)
        heads = self._native_heads(name, stored)
        return part if heads is None else native_to_hub_rows(part, heads)

    def scalar(self, name: str) -> float:
        """Read the value of a tensor without dimensions."""
        tensor = self.tensor(name)
        if tensor.numel() != 1:
            raise CheckpointError(f"{name} must be a scalar; its shape is {self.shape(name)}")
        return float(tensor.item())

    def scale(self, name: str) -> float:
        """The value of a 0-d scale; FormatError that names the stored tensor unless above 0."""
        value = self.scalar(name)
        if not (math.isfinite(value) and value > 0):
            stored = self._find(name)
            raise FormatError(f"{stored.path.name}: {stored.name} is {value:g}; a scale is above 0")
        return value

    def format_of(self, linear: str) -> WeightFormat:
        """How the weight of canonical linear `linear` is stored; bf16 outside the decoder."""
        return self.quantization.formats.get(linear, "bf16")

    def decoded(
        self,
        linear: str,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """The weight of `linear` as numbers, (out_features, in_features).

        linear   canonical module name, e.g. `decoder.4.mlp.up`
        dtype    computed in f32 and rounded once to this
        device   where it is decoded and stays: codes travel, not the decoded weight

        FP8 is fp32(code) * scale in both dialects, NVFP4 value(code) * block scale * tensor scale
        (docs/reference/formats.md#decoding-and-run-time). Raises FormatError for a scale that is
        not above 0.
        """
        weight = self.tensor(f"{linear}.weight").to(device)
        match self.format_of(linear):
            case "bf16":
                return weight.to(dtype)
            case "fp8":
                return decode_fp8(weight, self._fp8_scale(linear, device), dtype)
            case "nvfp4":
                encoded = EncodedNVFP4(
                    weight,
                    self.tensor(f"{linear}.weight_scale").to(device),
                    self._scale(f"{linear}.tensor_scale", device),
                )
                return decode_nvfp4(encoded, dtype)

    def _fp8_scale(self, linear: str, device: torch.device | str) -> Tensor:
        """The scale of an FP8 weight, 0-d, or those of its rows, (O, 1)."""
        name = f"{linear}.weight_scale"
        if self.shape(name) == ():
            return self._scale(name, device)
        return self.row_scales(linear).to(device)

    def row_scales(self, linear: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Read the scales of an FP8 weight's rows: f32 (O, 1).

        Raises FormatError that names the stored tensor unless all are above 0.
        """
        stored = self._find(f"{linear}.weight_scale")
        scale_O1 = read_rows(stored, start, stored.shape[0] if stop is None else stop).float()
        if not bool((torch.isfinite(scale_O1) & (scale_O1 > 0)).all()):
            raise FormatError(
                f"{stored.path.name}: {stored.name} has a value that is not above 0; a scale is"
            )
        return scale_O1

    def _scale(self, name: str, device: torch.device | str) -> Tensor:
        return torch.tensor(self.scale(name), dtype=torch.float32, device=device)

    def _find(self, name: str) -> StoredTensor:
        stored = self._stored.get(name)
        if stored is None:
            raise CheckpointError(f"{self.directory} holds no tensor {name}")
        return stored

    @staticmethod
    def _shape(stored: StoredTensor) -> tuple[int, ...]:
        return () if stored.shape == (1,) else stored.shape

    def _native_heads(self, name: str, stored: StoredTensor) -> int | None:
        if self.layout != "mistral" or len(stored.shape) < 2:
            return None
        return rotary_heads(name, self.config)


def _map_names(
    files: Mapping[str, StoredTensor], layout: Layout, quantization: Quantization
) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Canonical name -> stored tensor, and foreign name -> reason for those left alone."""
    stored: dict[str, StoredTensor] = {}
    ignored: dict[str, str] = {}
    unknown: list[StoredTensor] = []
    for foreign, tensor in files.items():
        reason = next((why for pattern, why in IGNORED_TENSORS if pattern.fullmatch(foreign)), None)
        name = canonical_name(foreign, layout, quantization.dialect)
        if reason is not None:
            ignored[foreign] = reason
        elif name is None:
            unknown.append(tensor)
        else:
            stored[name] = tensor
    if unknown:
        first = unknown[0]
        raise CheckpointError(
            f"{first.path.name}: {first.name} means nothing to us (layout {layout}, dialect "
            f"{quantization.dialect}){_others(len(unknown))}"
        )
    return stored, ignored


def _others(count: int) -> str:
    return f"; and {count - 1} others" if count > 1 else ""


def _compare(
    stored: dict[str, StoredTensor],
    expected: Mapping[str, Expected],
    layout: Layout,
    quantization: Quantization,
) -> None:
    """Prove that files and config agree, and bring `stored` into model order."""
    missing = [name for name in expected if name not in stored]
    if missing:
        some = ", ".join(foreign_name(n, layout, quantization.dialect) for n in missing[:3])
        raise CheckpointError(
            f"{len(missing)} tensors are missing: {some}{', …' * (len(missing) > 3)}"
        )
    extra = [tensor for name, tensor in stored.items() if name not in expected]
    if extra:
        raise CheckpointError(
            f"{extra[0].path.name}: {extra[0].name} has no place in the model that the config "
            f"describes{_others(len(extra))}"
        )
    for name, want in expected.items():
        tensor = stored[name]
        shape = () if want.shape == () and tensor.shape == (1,) else tensor.shape
        if shape != want.shape or tensor.dtype not in want.dtypes:
            is_wide = shape == want.shape and tensor.dtype in _as_any_float(want).dtypes
            do = "; `halfbyte import DIR OUT` writes it in bf16" if is_wide else ""
            raise CheckpointError(
                f"{tensor.path.name}: {tensor.name} is {_kind(tensor.dtype, tensor.shape)}, the "
                f"config asks for {_kind(want.dtypes[0], want.shape)}{do}"
            )
    ordered = {name: stored[name] for name in expected}
    stored.clear()
    stored.update(ordered)


def _as_any_float(want: Expected) -> Expected:
    if want.dtypes != (torch.bfloat16,):
        return want
    return Expected(want.shape, (*want.dtypes, torch.float32, torch.float16))


def _kind(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"
