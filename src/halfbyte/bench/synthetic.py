"""A decoder of any geometry with random weights, made on the device in streaming order.

Codes and scales are distributed as quantizing normal weights leaves them, because products run
faster on zeros and on few distinct values. Nothing is read; 90 GB take under a second. Used by the
speed benchmarks, which need the model's bytes but not its knowledge.
"""

import ctypes
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.config import RopeConfig, TextConfig
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


def mixed_formats(num_layers: int) -> tuple[WeightFormat, ...]:
    """Format of each layer's MLP as shipped: NVFP4 but for the first four and the last."""
    return tuple(
        "fp8" if layer < 4 or layer == num_layers - 1 else "nvfp4" for layer in range(num_layers)
    )


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
    mlp_formats: tuple[WeightFormat, ...],
    *,
    attention_format: TileFormat = "fp8",
    seed: int = 0,
    mode: Products = "exact",
) -> CudaWeights:
    """All weights of a decoder in its mixed format. Norm weights are near 1."""
    tables = make_tables(library.device, seed)
    device, width = library.device, config.width
    torch.manual_seed(seed)
    query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def norm() -> Tensor:
        return (1.0 + 0.1 * torch.randn(width, device=device)).to(torch.bfloat16)

    def layer(index: int, mlp: TileFormat) -> CudaLayer:
        def weight(format_: TileFormat, out: int, in_: int, place: int) -> TiledWeight:
            number = (seed * 1000 + index) * 8 + place
            return random_weight(library, tables, format_, out, in_, number)

        # Normalised inputs reach about 6; attention's average and the MLP's product less.
        gain = {"fp8": 8.0 / 448.0, "nvfp4": 1.0, "nvfp4_fast": 1.0, "bf16": 1.0}
        return CudaLayer(
            norm(),
            CudaLinear(weight(attention_format, query + 2 * kv, width, 0), gain[attention_format]),
            CudaLinear(weight(attention_format, width, query, 1), gain[attention_format] / 2),
            norm(),
            CudaLinear(weight(mlp, 2 * config.mlp_width, width, 2), gain[mlp]),
            CudaLinear(
                weight(mlp, width, config.mlp_width, 3), gain[mlp] * (2 if mlp == "fp8" else 1)
            ),
            k_scale=8.0 / 448.0,
            v_scale=8.0 / 448.0,
        )

    embedding = torch.empty(config.vocab_size, width, dtype=torch.bfloat16, device=device)
    for part in torch.split(embedding, 4096):
        part.normal_()
    head = random_weight(library, tables, "bf16", config.vocab_size, width, seed)
    nvfp4: TileFormat = "nvfp4_fast" if mode == "fast" else "nvfp4"
    layers = tuple(
        layer(index, nvfp4 if mlp == "nvfp4" else mlp) for index, mlp in enumerate(mlp_formats)
    )
    return CudaWeights(config, embedding, layers, norm(), CudaLinear(head))
