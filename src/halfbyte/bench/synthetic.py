"""A decoder of any geometry with random weights, made on the device in streaming order.

Codes and scales are distributed as quantizing normal weights leaves them, because products run
faster on zeros and on few distinct values. Nothing is read; 90 GB take under a second. Used by the
speed benchmarks, which need the model's bytes but not its knowledge.
"""

import ctypes
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.config import ModelConfig, RopeConfig, TextConfig
from halfbyte.formats.minifloat import encode_e2m1, encode_e4m3
from halfbyte.kernels.cuda.driver import Launch
from halfbyte.kernels.cuda.library import KernelLibrary
from halfbyte.kernels.repack import (
    K_BLOCK,
    NVFP4_GAIN,
    ROWS,
    TILE_ROWS,
    UNIT_BYTES,
    TiledWeight,
    TileFormat,
    encode_scales,
    fast_scales,
    padded,
)
from halfbyte.model.cuda.weights import CudaLayer, CudaLinear, CudaWeights, Products
from halfbyte.modules import WeightFormat
from halfbyte.recipe.plan import make_plan
from halfbyte.recipe.schema import load_recipe

# The recipe of the model as it is shipped.
SHIPPED_RECIPE = "medium-3.5"
# Largest of the few hundred million normal values of a matrix, in standard deviations.
_LARGEST_SIGMA = 5.8


def medium_geometry(num_layers: int = 88) -> TextConfig:
    """The sizes of Mistral Medium 3.5's decoder, cut to `num_layers` layers."""
    return TextConfig(
        num_layers=num_layers,
        width=12288,
        num_heads=96,
        num_kv_heads=8,
        head_dim=128,
        mlp_width=28672,
        vocab_size=131072,
        norm_eps=1e-5,
        max_positions=262144,
        rope=RopeConfig(theta=1e6),
        tied_head=False,
        bos_token_id=1,
        eos_token_ids=(2,),
        pad_token_id=None,
    )


def formats_of(
    config: TextConfig, recipe: str = SHIPPED_RECIPE, head: WeightFormat | None = None
) -> dict[str, WeightFormat]:
    """Format of each linear under a recipe of the library or of a file, by canonical name.

    head  that of the output head, whatever the recipe says
    """
    formats = dict(make_plan(load_recipe(recipe), ModelConfig(config, None)).formats)
    return formats if head is None else {**formats, "head": head}


@dataclass(frozen=True, slots=True)
class Tables:
    """Equally likely codes and bytes that the filling kernel draws from, on the device."""

    codes: Tensor  # 256 e2m1 codes
    scale_bytes: Tensor  # 4096 encoded block scales
    fast_scale_bytes: Tensor  # the same for "nvfp4_fast"
    e4m3_bytes: Tensor  # 4096 e4m3 codes


def make_tables(device: torch.device, seed: int = 0) -> Tables:
    """Quantize normal values and keep evenly spaced quantiles of what came out."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randn(1 << 16, 16, generator=generator)
    scales = encode_e4m3(blocks.abs().amax(-1) / _LARGEST_SIGMA * 448.0)
    unit = scales.float() * _LARGEST_SIGMA / 448.0 / 6.0
    codes = encode_e2m1(blocks / unit[:, None]).flatten().sort().values
    encoded = encode_scales(scales).sort().values
    # As one row, so that all have one gain.
    fast = fast_scales(torch.zeros(1, scales.numel() * 8, dtype=torch.uint8), scales[None])[1]
    fast = fast.flatten().sort().values
    quantiles = (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096
    normal = math.sqrt(2.0) * torch.erfinv(2.0 * quantiles - 1.0)
    e4m3 = encode_e4m3(normal.float() * 448.0 / _LARGEST_SIGMA)
    return Tables(
        codes[:: codes.numel() // 256][:256].contiguous().to(device),
        encoded[:: encoded.numel() // 4096][:4096].contiguous().to(device),
        fast[:: fast.numel() // 4096][:4096].contiguous().to(device),
        e4m3.view(torch.uint8).to(device),
    )


def random_weight(
    library: KernelLibrary,
    tables: Tables,
    format_: TileFormat,
    out_features: int,
    in_features: int,
    seed: int,
) -> TiledWeight:
    """A tiled weight whose values have a standard deviation of 1 / sqrt(in_features)."""
    device = library.device
    rows = padded(out_features, TILE_ROWS)
    k_blocks = padded(in_features, K_BLOCK[format_]) // K_BLOCK[format_]
    shape = (rows // ROWS, k_blocks, UNIT_BYTES[format_])
    deviation = 1.0 / math.sqrt(in_features)
    if format_ == "bf16":
        data = torch.empty(shape, dtype=torch.uint8, device=device)
        values = data.view(torch.bfloat16)
        for part in torch.split(values, 512):
            part.normal_(0.0, deviation)
        return TiledWeight(format_, data, torch.ones(rows, device=device), rows, in_features)
    data = torch.empty(shape, dtype=torch.uint8, device=device)
    drawn = {"nvfp4": tables.scale_bytes, "nvfp4_fast": tables.fast_scale_bytes}
    arguments = (
        data,
        ctypes.c_int64(data.numel() // 4),
        tables.codes,
        drawn.get(format_, tables.e4m3_bytes),
        UNIT_BYTES[format_] // 4,
        4096 // 4 if format_ in drawn else 0,
        int(format_ == "nvfp4"),
        seed,
    )
    kernel = library.layout()["fill_random"]
    launch = Launch(kernel, (4096, 1, 1), 256, arguments, overlaps=False)
    launch.run(torch.cuda.current_stream().cuda_stream)
    # Largest weight = largest code * largest scale * tensor scale (FP8: largest code * scale). The
    # largest scale is 448: 2**-3 of it is what the fast product has.
    gains = {"nvfp4": 6.0 / NVFP4_GAIN, "nvfp4_fast": 6.0 / 8.0}
    largest = 448.0 * gains.get(format_, 1.0)
    row_scale = torch.full((rows,), _LARGEST_SIGMA * deviation / largest, device=device)
    return TiledWeight(format_, data, row_scale, rows, in_features)


def random_weights(
    library: KernelLibrary,
    config: TextConfig,
    formats: Mapping[str, WeightFormat],
    *,
    is_per_token: bool = False,
    seed: int = 0,
    mode: Products = "exact",
) -> CudaWeights:
    """All weights of a decoder. Norm weights are near 1.

    formats       of each linear by canonical name, partners of a group alike (`formats_of`); a head
                  that is not named is bf16
    is_per_token  activations of FP8 linears are rounded by each token's largest value
    """
    tables = make_tables(library.device, seed)
    device, width = library.device, config.width
    torch.manual_seed(seed)
    query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def norm() -> Tensor:
        return (1.0 + 0.1 * torch.randn(width, device=device)).to(torch.bfloat16)

    def linear(name: str, out: int, in_: int, number: int, largest: float) -> CudaLinear:
        """`largest` is what its inputs reach; their scale is made for it."""
        stated = formats.get(name, "bf16")
        format_: TileFormat = stated
        if stated == "nvfp4" and mode == "fast":
            format_ = "nvfp4_fast"
        weight = random_weight(library, tables, format_, out, in_, number)
        if format_ != "fp8":
            return CudaLinear(weight)
        return CudaLinear(weight, None if is_per_token else largest / 448.0)

    def layer(index: int) -> CudaLayer:
        attention, mlp = f"decoder.{index}.attention", f"decoder.{index}.mlp"
        number, up = (seed * 1000 + index) * 8, config.mlp_width
        # Normalised inputs reach about 6; attention's average less, the MLP's product more.
        return CudaLayer(
            norm(),
            linear(f"{attention}.q", query + 2 * kv, width, number, 8.0),
            linear(f"{attention}.o", width, query, number + 1, 4.0),
            norm(),
            linear(f"{mlp}.gate", 2 * up, width, number + 2, 8.0),
            linear(f"{mlp}.down", width, up, number + 3, 16.0),
            k_scale=8.0 / 448.0,
            v_scale=8.0 / 448.0,
        )

    embedding = torch.empty(config.vocab_size, width, dtype=torch.bfloat16, device=device)
    for part in torch.split(embedding, 4096):
        part.normal_()
    head = linear("head", config.vocab_size, width, seed, 8.0)
    layers = tuple(layer(index) for index in range(config.num_layers))
    return CudaWeights(config, embedding, layers, norm(), head)
