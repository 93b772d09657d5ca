"""Checkpoint -> `CudaWeights`: which checkpoints the kernels take, and repacking on the device.

While one layer's tensors are repacked there, the next layer's are on their way (`read`).

Shapes: O, I features; B 16-blocks along I.
"""

import math
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from halfbyte.checkpoint.names import native_to_hub_rows, rotary_heads
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.errors import CheckpointError, UnsupportedError
from halfbyte.kernels.repack import tile_nvfp4, tile_rows
from halfbyte.log import logger
from halfbyte.model.cuda.read import Arrived, TensorReader, cut, shape_of
from halfbyte.model.cuda.weights import CudaLayer, CudaLinear, CudaWeights, Products
from halfbyte.model.linear import is_per_token
from halfbyte.model.load import check_draft
from halfbyte.model.parallel import Shard, Slice, shard_of, slice_of
from halfbyte.modules import CacheFormat, Fp8Activations

_QKV, _GATED = ("q", "k", "v"), ("gate", "up")
# Largest activation of a layer as a multiple of the largest one calibration saw.
_HEADROOM = 4.0
_F16_MAX = 65504.0
_FUSE = "eagle.fuse"

Role = Literal["weight", "weight_scale"]


def reason_against(
    checkpoint: Checkpoint,
    kv_cache: CacheFormat,
    block_tokens: int,
    *,
    products: str = "exact",
    num_ranks: int = 1,
    fp8_activations: Fp8Activations = "auto",
) -> str | None:
    """Why the CUDA kernels cannot run this model; None when they can. Reads no tensor data."""
    formats = checkpoint.quantization.formats
    # The last rank's share of the MLP is the smallest where they are uneven.
    text = shard_of(checkpoint.config.text, num_ranks - 1, num_ranks).local(checkpoint.config.text)
    if kv_cache != "fp8":
        return f"the KV cache is {kv_cache}; the kernels read FP8 (kv_cache fp8 forces it)"
    if block_tokens % 16:
        return f"blocks of {block_tokens} tokens; the kernels want a multiple of 16"
    if text.head_dim not in (64, 128):
        return f"heads of {text.head_dim}; the kernels are written for 64 and 128"
    if text.num_heads // text.num_kv_heads > 16:
        return f"{text.num_heads // text.num_kv_heads} query heads a KV head; the kernels take 16"
    if text.width % 64 or text.mlp_width % 8:
        return f"width {text.width}, MLP {text.mlp_width}; multiples of 64 and 8 are needed"
    if products == "fast" and text.mlp_width > 48 * 1024:
        return f"MLP of {text.mlp_width}; fast products take {48 * 1024}"
    for layer in range(text.num_layers):
        prefix = f"decoder.{layer}"
        for group in _groups(prefix):
            kinds = {formats.get(name, "bf16") for name in group}
            if len(kinds) > 1:
                return f"{group[0]} and its neighbours are in {' and '.join(sorted(kinds))}"
    static = formats if fp8_activations == "static" else {}
    lacking = [n for n in static if formats[n] == "fp8" and f"{n}.input_scale" not in checkpoint]
    if lacking:
        return f"{lacking[0]} is FP8 without an input scale, which fp8_activations static wants"
    return None


def reason_against_draft(
    checkpoint: Checkpoint,
    block_tokens: int,
    *,
    products: str = "exact",
    fp8_activations: Fp8Activations = "auto",
) -> str | None:
    """Why the CUDA kernels cannot run this draft model (`Checkpoint.open_eagle`)."""
    reason = reason_against(
        checkpoint, "fp8", block_tokens, products=products, fp8_activations=fp8_activations
    )
    format_ = checkpoint.format_of(_FUSE)
    if reason is None and format_ == "nvfp4":
        # No dialect of draft models has it.
        reason = f"{_FUSE} is NVFP4; the kernels want it in FP8 or bf16"
    return None if reason is None else f"draft model {checkpoint.directory.name}: {reason}"


def _groups(prefix: str) -> tuple[list[str], ...]:
    """A layer's linears, those that read one input together."""
    return (
        [f"{prefix}.attention.{short}" for short in _QKV],
        [f"{prefix}.attention.o"],
        [f"{prefix}.mlp.{short}" for short in _GATED],
        [f"{prefix}.mlp.down"],
    )


class _Tensors:
    """Tensors of one checkpoint on their way to the device, and which were taken."""

    def __init__(self, checkpoint: Checkpoint, reader: TensorReader, shard: Shard) -> None:
        self._checkpoint = checkpoint
        self._reader = reader
        self._shard = shard
        self._names = frozenset(checkpoint.names())
        self._taken: set[str] = set()
        self._coming: dict[str, tuple[Tensor, list[Future[Arrived]]]] = {}
        self._stacks: dict[tuple[str, ...], Tensor] = {}

    def start(
        self, name: str, target: Tensor | None = None, part: tuple[int, range] | None = None
    ) -> None:
        """Begin to read a tensor, into `target` if given.

        part    rows (axis 0) or columns (axis 1) of it
        """
        stored, columns = self._checkpoint.stored(name), None
        if part is not None and len(part[1]) < stored.shape[part[0]]:
            stored, columns = cut(stored, *part)
        if target is None:
            target = torch.empty(
                shape_of(stored, columns), dtype=stored.dtype, device=self._reader.device
            )
        self._coming[name] = (target, self._reader.read_into(stored, target, columns))

    def start_stacked(self, linears: Sequence[str], role: Role) -> None:
        """Begin to read tensors of one width into one matrix, one below the other."""
        parts = [self._part(linear, role) for linear in linears]
        names = [f"{linear}.{role}" for linear in linears]
        stored = [self._checkpoint.stored(name) for name in names]
        rows = [self.num_rows(linear) for linear in linears]
        width = len(parts[0].indices) if parts[0].axis == 1 else stored[0].shape[1]
        dtype, device = stored[0].dtype, self._reader.device
        whole = torch.empty(sum(rows), width, dtype=dtype, device=device)
        pieces = torch.split(whole, rows)
        for name, part, piece in zip(names, parts, pieces, strict=True):
            self.start(name, piece, part)
        self._stacks[tuple(names)] = whole

    def _part(self, linear: str, role: Role) -> Slice:
        if linear == _FUSE:  # of no layer, and never shared
            return Slice(0, range(self.num_rows(linear)))
        head_dim = self._checkpoint.config.text.head_dim
        return slice_of(self._shard, head_dim, linear, role, self._checkpoint.format_of(linear))

    def num_rows(self, linear: str) -> int:
        """Output features of a linear that this rank holds."""
        if linear == _FUSE:
            return self._checkpoint.shape(f"{linear}.weight")[0]
        part = self._part(linear, "weight")
        whole = self._checkpoint.shape(f"{linear}.weight")[0]
        return len(part.indices) if part.axis == 0 else whole

    def take(self, name: str) -> Tensor:
        """A tensor that was started; q and k in hub row order."""
        self._taken.add(name)
        target, pieces = self._coming.pop(name)
        self._reader.wait(pieces)
        config = self._checkpoint.config
        is_native = self._checkpoint.layout == "mistral" and target.dim() >= 2
        if is_native and rotary_heads(name, config) is not None:
            heads = target.shape[0] // config.text.head_dim
            target.view(torch.uint8).copy_(native_to_hub_rows(target.view(torch.uint8), heads))
        return target

    def take_stacked(self, linears: Sequence[str], role: Role) -> Tensor:
        names = [f"{linear}.{role}" for linear in linears]
        for name in names:
            self.take(name)
        return self._stacks.pop(tuple(names))

    def scalar(self, name: str) -> float:
        self._taken.add(name)
        return self._checkpoint.scale(name)

    def optional_scalar(self, name: str) -> float | None:
        return self.scalar(name) if name in self._names else None

    def check_all_taken(self) -> None:
        left = sorted(
            name
            for name in self._names - self._taken
            if not name.startswith(("encoder.", "projector."))
        )
        if left:
            raise CheckpointError(f"{len(left)} tensors are not used by the model: {left[:3]}")


def load_cuda_weights(
    checkpoint: Checkpoint,
    device: torch.device,
    *,
    num_threads: int | None = None,
    num_spare_embeddings: int = 0,
    shard: Shard | None = None,
    mode: Products = "exact",
    fp8_activations: Fp8Activations = "auto",
) -> CudaWeights:
    """The text model in streaming order on `device`; `reason_against` must have found nothing.

    num_spare_embeddings  zero rows behind the vocabulary's, for vectors of images
    shard                 a tensor-parallel rank's part; its embedding has one zero row more, ahead
                          of the spare ones (`parallel.embedding_rows`)
    mode                  how NVFP4 weights will multiply: "exact", or "fast" in FP8
    fp8_activations       by what FP8 products round their input
    Raises CheckpointError for a tensor that cannot be read and for one that nothing reads.
    """
    text = checkpoint.config.text
    shard = shard or shard_of(text, 0, 1)
    vocab = shard.vocab
    choice = _Choice(mode, fp8_activations)
    with TensorReader(device, num_threads=num_threads) as reader:
        tensors = _Tensors(checkpoint, reader, shard)
        rows = len(vocab) + num_spare_embeddings + (not shard.is_whole)
        embedding_VD = torch.zeros(rows, text.width, dtype=torch.bfloat16, device=device)
        _check_bf16(checkpoint, "embedding.weight")
        tensors.start("embedding.weight", embedding_VD[: len(vocab)], (0, vocab))
        if not text.tied_head:
            if checkpoint.format_of("head") == "bf16":
                _check_bf16(checkpoint, "head.weight")
            _start_linear(tensors, checkpoint, ["head"])
        tensors.start("norm.weight")
        _start_layer(tensors, checkpoint, 0)
        tensors.take("embedding.weight")
        if text.tied_head:
            ones = torch.ones(len(vocab), device=device)
            head = CudaLinear(tile_rows(embedding_VD[: len(vocab)], ones, "bf16"))
        else:
            head = _take_linear(tensors, checkpoint, ["head"], choice)
        norm_D = tensors.take("norm.weight").to(torch.bfloat16)
        layers = []
        for index in range(text.num_layers):
            if index + 1 < text.num_layers:
                _start_layer(tensors, checkpoint, index + 1)
            layers.append(_take_layer(tensors, checkpoint, index, choice))
        tensors.check_all_taken()
    part = None if shard.is_whole else vocab
    return CudaWeights(shard.local(text), embedding_VD, tuple(layers), norm_D, head, part)


def load_cuda_draft(
    checkpoint: Checkpoint,
    target: CudaWeights,
    *,
    num_threads: int | None = None,
    mode: Products = "exact",
    fp8_activations: Fp8Activations = "auto",
) -> CudaWeights:
    """A draft model (`Checkpoint.open_eagle`) beside the model that it guesses for, on its device.

    `reason_against_draft` must have found nothing. Raises CheckpointError as `load_cuda_weights`
    does, and if the two do not fit together.
    """
    text = checkpoint.config.text
    check_draft(checkpoint, target.config)
    choice = _Choice(mode, fp8_activations)
    with TensorReader(target.embedding_VD.device, num_threads=num_threads) as reader:
        tensors = _Tensors(checkpoint, reader, shard_of(text, 0, 1))
        _start_linear(tensors, checkpoint, [_FUSE])
        tensors.start("norm.weight")
        _start_layer(tensors, checkpoint, 0)
        fuse = _take_linear(tensors, checkpoint, [_FUSE], choice)
        norm_D = tensors.take("norm.weight").to(torch.bfloat16)
        layers = []
        for index in range(text.num_layers):
            if index + 1 < text.num_layers:
                _start_layer(tensors, checkpoint, index + 1)
            layers.append(_take_layer(tensors, checkpoint, index, choice))
        tensors.check_all_taken()
    head = target.head
    return CudaWeights(text, target.embedding_VD, tuple(layers), norm_D, head, fuse=fuse)


def _check_bf16(checkpoint: Checkpoint, name: str) -> None:
    if checkpoint.dtype(name) != torch.bfloat16:
        raise UnsupportedError(f"{name} is {checkpoint.dtype(name)}; the kernels want bf16")


def _start_layer(tensors: _Tensors, checkpoint: Checkpoint, index: int) -> None:
    prefix = f"decoder.{index}"
    tensors.start(f"{prefix}.attention_norm.weight")
    tensors.start(f"{prefix}.mlp_norm.weight")
    for group in _groups(prefix):
        _start_linear(tensors, checkpoint, group)


def _start_linear(tensors: _Tensors, checkpoint: Checkpoint, group: list[str]) -> None:
    tensors.start_stacked(group, "weight")
    if _has_scales_of_rows(checkpoint, group[0]):
        tensors.start_stacked(group, "weight_scale")


def _has_scales_of_rows(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a linear's `weight_scale` is a matrix: NVFP4's, or one value for each row in FP8."""
    scale = f"{name}.weight_scale"
    return scale in checkpoint and len(checkpoint.shape(scale)) == 2


class _Choice(NamedTuple):
    """How a model's products are to compute where its files leave it open."""

    mode: Products
    fp8_activations: Fp8Activations


def _take_layer(
    tensors: _Tensors, checkpoint: Checkpoint, index: int, choice: _Choice
) -> CudaLayer:
    prefix = f"decoder.{index}"
    qkv, o, gate_up, down = (_take_linear(tensors, checkpoint, g, choice) for g in _groups(prefix))
    k_scale = tensors.optional_scalar(f"{prefix}.attention.k_scale")
    v_scale = tensors.optional_scalar(f"{prefix}.attention.v_scale")
    return CudaLayer(
        tensors.take(f"{prefix}.attention_norm.weight").to(torch.bfloat16),
        qkv,
        o,
        tensors.take(f"{prefix}.mlp_norm.weight").to(torch.bfloat16),
        gate_up,
        down,
        k_scale=1.0 if k_scale is None else k_scale,
        v_scale=1.0 if v_scale is None else v_scale,
    )


def _take_linear(
    tensors: _Tensors, checkpoint: Checkpoint, group: list[str], choice: _Choice
) -> CudaLinear:
    """A group's weights as one tiled weight, and what its input is divided by."""
    format_ = checkpoint.format_of(group[0])
    w_OI = tensors.take_stacked(group, "weight")
    sizes = [tensors.num_rows(name) for name in group]
    if format_ == "bf16":
        ones = torch.ones(w_OI.shape[0], device=w_OI.device)
        return CudaLinear(tile_rows(w_OI.to(torch.bfloat16), ones, "bf16"))
    input_scales = [tensors.optional_scalar(f"{name}.input_scale") for name in group]
    known = [scale for scale in input_scales if scale is not None]
    if format_ == "fp8":
        if _has_scales_of_rows(checkpoint, group[0]):
            scale_O = tensors.take_stacked(group, "weight_scale").flatten().float()
        else:
            scales = [tensors.scalar(f"{name}.weight_scale") for name in group]
            scale_O = _per_row(scales, sizes, w_OI)
        weight = tile_rows(w_OI, scale_O, "fp8")
        if is_per_token(input_scales, choice.fp8_activations):
            return CudaLinear(weight, None)
        if len(set(known)) > 1:
            logger.debug("%s: input scales differ; the largest serves all", group[0])
        return CudaLinear(weight, max(known))
    scale_OB = tensors.take_stacked(group, "weight_scale")
    scales = [tensors.scalar(f"{name}.tensor_scale") for name in group]
    tensor_scale_O = _per_row(scales, sizes, w_OI)
    weight = tile_nvfp4(w_OI, scale_OB, tensor_scale_O, is_fast=choice.mode == "fast")
    return CudaLinear(weight, f16_divisor(max(known)) if known else 1.0)


def f16_divisor(input_scale: float) -> float:
    """The power of two that keeps activations inside fp16: 1.0 unless they are extreme.

    input_scale  of NVFP4 activations: the largest that calibration saw is 6 * 448 times it
    """
    largest = input_scale * 6.0 * 448.0 * _HEADROOM
    return 2.0 ** max(0, math.ceil(math.log2(largest / _F16_MAX))) if largest > 0 else 1.0


def _per_row(scales: Sequence[float], sizes: Sequence[int], like: Tensor) -> Tensor:
    """Each member's scale, repeated for its rows: f32 (O,)."""
    values = torch.tensor(scales, dtype=torch.float32)
    return values.repeat_interleave(torch.tensor(sizes)).to(like.device)
