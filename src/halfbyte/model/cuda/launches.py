"""What decode steps and prefill share: memory, where activations lie, kernels of a geometry.

Shapes: T tokens, D model width.
"""

import ctypes
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from halfbyte.config import TextConfig
from halfbyte.formats.fp8 import round_tokens_to_fp8
from halfbyte.formats.minifloat import E4M3_MAX
from halfbyte.kernels.cuda.driver import Argument, Kernel, Launch
from halfbyte.kernels.cuda.library import HeadShape, KernelLibrary, OutKind
from halfbyte.kernels.cuda.ops import stream_product
from halfbyte.kernels.repack import padded
from halfbyte.model.cuda.weights import PER_TOKEN_KINDS, CudaLinear, CudaWeights, KvCache
from halfbyte.model.saturation import SaturationCounts

F16_MAX = 65504.0  # largest fp16
# Cosines, sines and the scale of queries, if there is one, of positions (`rope.RotaryTable.at`).
RotaryFunction = Callable[[Tensor], tuple[Tensor, Tensor, Tensor | None]]
# Adds up a tensor over the ranks, in place.
AllReduce = Callable[[Tensor], object]


class SharedBuffers:
    """Scratch memory of steps that never run at the same time; make the largest step first."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for `count` elements under this name; what it holds is undefined."""
        held = self._buffers.get(name)
        if held is None or held.numel() < count:
            # Zeros: whatever reads more than was written must find numbers.
            held = torch.zeros(count, dtype=dtype, device=device)
            self._buffers[name] = held
        return held[:count]

    @property
    def num_bytes(self) -> int:
        """Bytes of the buffers taken last under each name."""
        return sum(t.numel() * t.element_size() for t in self._buffers.values())


class CudaModel(NamedTuple):
    """What every step of a model on one device stands on.

    shared      scratch memory, together with the other steps of this device
    all_reduce  adds up embeddings and o's and down's outputs over the ranks; None on one device
    saturation  counts of clipped activations that steps add to; None where nobody asks
    """

    library: KernelLibrary
    weights: CudaWeights
    cache: KvCache
    rotary: RotaryFunction
    shared: SharedBuffers
    all_reduce: AllReduce | None = None
    saturation: SaturationCounts | None = None


class Collective(NamedTuple):
    """A sum over ranks in the list of launches; it runs on torch's current stream."""

    function: AllReduce
    tensor: Tensor

    def run(self, stream: int) -> None:
        del stream
        self.function(self.tensor)


class Activation(NamedTuple):
    """Where a linear's input lies: 16-byte chunks, chunk-major (repack.tile_activations)."""

    data: Tensor
    kind: OutKind
    chunk_stride: int
    token_stride: int
    scale: float
    token_scale_T: Tensor | None = None

    def arguments(self) -> tuple[Argument, ...]:
        return (
            self.data,
            ctypes.c_int64(self.chunk_stride),
            ctypes.c_int64(self.token_stride),
            self.scale,
        )


def heads_of(config: TextConfig) -> HeadShape:
    """The shape of attention, which its kernels are compiled for."""
    return HeadShape(config.head_dim, config.num_heads, config.num_kv_heads)


def elementwise_kernels(
    library: KernelLibrary, config: TextConfig, norm_blocks: int
) -> dict[str, Kernel]:
    """Kernels between the products; `norm_blocks` blocks share a token where it is normed."""
    return library.elementwise(config.width, config.mlp_width, norm_blocks, heads_of(config))


def attention_splits(num_pairs: int, num_multiprocessors: int) -> int:
    """Number of blocks that share the context of one pair of a sequence and a KV head.

    Enough of them to give each multiprocessor two blocks.
    """
    return min(32, max(1, -(-2 * num_multiprocessors // num_pairs)))


# Rows of a block of chunk attention (chunk_attention.cu), and keys of a tile.
CHUNK_ROWS = 128
CHUNK_KEYS = 128
# What beginning and ending a block costs, in tiles; splits cost as much again (estimated).
_BLOCK_TILES = 2
_MOST_CHUNK_SPLITS = 16


def context_bytes(num_keys: int, config: TextConfig) -> int:
    """Bytes of one layer's keys and values in tiles of fp16, as attention of chunks reads them."""
    return 2 * padded(num_keys, CHUNK_KEYS) * config.num_kv_heads * config.head_dim * 2


def chunk_tiles(num_tokens: int, group: int) -> int:
    """Number of blocks of rows of a chunk, in which a KV head has `group` query heads a token."""
    return -(-num_tokens * group // CHUNK_ROWS)


def chunk_splits(num_pairs: int, num_keys: int, num_multiprocessors: int) -> int:
    """Number of blocks that share the context of one pair of a block of rows and a KV head.

    So many that the last wave of blocks leaves few multiprocessors idle.
    """
    num_tiles = -(-num_keys // CHUNK_KEYS)

    def time_of(splits: int) -> int:
        waves = -(-num_pairs * splits // num_multiprocessors)
        return waves * (-(-num_tiles // splits) + _BLOCK_TILES * (1 + (splits > 1)))

    return min(range(1, _MOST_CHUNK_SPLITS + 1), key=time_of)


def kernel_scale(linear: CudaLinear) -> float:
    """e4m3 activations are divided by the scale, fp16 ones multiplied by its inverse."""
    if linear.input_scale is None:
        return 1.0  # made of each token by the kernel
    return 1.0 / linear.input_scale if linear.weight.format == "nvfp4" else linear.input_scale


def attention_kind(o: CudaLinear) -> OutKind:
    """What attention writes for an `o`; a token's largest value is known behind all its blocks."""
    return "bf16" if o.activation_kind in PER_TOKEN_KINDS else o.activation_kind


def rounded_input(linear: CudaLinear, x_TI: Tensor) -> tuple[Tensor, Tensor | None]:
    """A product's input rounded as its kernels want it, by torch; and the scale of each token.

    Features are in order: those of "e4m3_paired" are still to be paired.
    """
    match linear.activation_kind:
        case "bf16":
            return x_TI.to(torch.bfloat16), None
        case "f16":
            scaled_TI = x_TI.float() * kernel_scale(linear)
            return scaled_TI.clamp(-F16_MAX, F16_MAX).to(torch.float16), None
        case "e4m3":
            scaled_TI = x_TI.float() / kernel_scale(linear)
            return scaled_TI.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), None
        case "e4m3_token" | "e4m3_paired":
            return round_tokens_to_fp8(x_TI)


def joined_input(
    fuse: CudaLinear, embedded_TD: Tensor, hidden_TD: Tensor
) -> tuple[Tensor, Tensor | None]:
    """What a draft model's first product reads, as `rounded_input`: (T, 2 D)."""
    return rounded_input(fuse, torch.cat((embedded_TD, hidden_TD), dim=-1))


def head_logits(library: KernelLibrary, head: CudaLinear, hidden_RD: Tensor) -> Tensor:
    """The head of up to 128 rows behind the final norm, bf16: f32 (R, V padded)."""
    x_RD, scale_R = rounded_input(head, hidden_RD)
    logits_RV = stream_product(library, head.weight, x_RD)
    if scale_R is not None:
        return logits_RV.mul_(scale_R[:, None])
    return logits_RV if head.sums_scale == 1.0 else logits_RV.mul_(head.sums_scale)


def count_grid(num_features: int, num_tokens: int) -> tuple[int, int, int]:
    """Blocks of 128 threads that count a row's codes, 16 a thread at a time."""
    return min(8, -(-num_features // (16 * 128))), num_tokens, 1


def launch(
    kernel: Kernel,
    grid: tuple[int, int, int],
    num_threads: int,
    *arguments: Argument,
    overlaps: bool = True,
) -> None:
    """Enqueue a kernel on torch's current stream; with `overlaps` it waits for the one ahead."""
    stream = torch.cuda.current_stream().cuda_stream
    Launch(kernel, grid, num_threads, arguments, overlaps=overlaps).run(stream)
