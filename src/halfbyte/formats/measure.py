"""How far an approximation is from the original: SQNR, clip and zero rates; maxima.

Sums run in float64 over chunks, so that a full-width weight needs no second copy of itself.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# Values worked on at once: a few f32 vectors of this length stay inside the processor's cache.
CHUNK_VALUES = 1 << 19
# On a GPU a chunk must be large enough to be worth a launch; a few f32 vectors of it have 300 MB.
GPU_CHUNK_VALUES = 1 << 24


def chunk_values(device: torch.device) -> int:
    """How many values to work on at once on this device."""
    return CHUNK_VALUES if device.type == "cpu" else GPU_CHUNK_VALUES


def largest_magnitude(x: Tensor) -> Tensor:
    """Max |x| in x's own dtype, 0-d; NaN if any element is NaN. An empty tensor gives 0."""
    if x.numel() == 0:
        return x.new_zeros(())
    if x.dtype != torch.bfloat16:
        return x.abs().amax()
    # Magnitudes of bf16 order like their bits, and integers reduce many times faster.
    bits, chunk = x.reshape(-1).view(torch.int16), chunk_values(x.device)
    parts = [
        bits[start : start + chunk].bitwise_and(0x7FFF).amax()
        for start in range(0, bits.numel(), chunk)
    ]
    return torch.stack(parts).amax().view(torch.bfloat16)


def largest_fp8_code(codes: Tensor) -> Tensor:
    """Return the largest of e4m3 codes without their signs; NaN's is above all others.

    codes    e4m3, any shape; no codes give 0
    returns  e4m3, 0-d
    """
    bits, chunk = codes.reshape(-1).view(torch.uint8), chunk_values(codes.device)
    parts = [
        bits[start : start + chunk].bitwise_and(0x7F).amax()
        for start in range(0, bits.numel(), chunk)
    ]
    return torch.stack([bits.new_zeros(()), *parts]).amax().view(torch.float8_e4m3fn)


def _chunks(*tensors: Tensor, dtype: torch.dtype = torch.float32) -> Iterator[tuple[Tensor, ...]]:
    flat = [tensor.reshape(-1) for tensor in tensors]
    chunk = chunk_values(flat[0].device)
    for start in range(0, flat[0].numel(), chunk):
        yield tuple(part[start : start + chunk].to(dtype) for part in flat)


def _power(x: Tensor) -> float:
    return float(torch.dot(x, x))


# A sum of squares from here on has lost nothing that matters to squares below f32's smallest.
_SAFE_POWER = 2.0**-96


def _powers(reference: Tensor, approximation: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    signal = noise = 0.0
    for a, b in _chunks(reference, approximation, dtype=dtype):
        signal += _power(a)
        noise += _power(b.sub(a))
    return signal, noise


def relative_error(reference: Tensor, approximation: Tensor) -> float:
    """||approximation - reference|| / ||reference||; 0 if both are zero, inf if only one is."""
    signal, noise = _powers(reference, approximation, torch.float32)
    if not (_SAFE_POWER < signal < math.inf and noise < math.inf):
        # Squares have left the range of f32; weights of a damaged source do that.
        signal, noise = _powers(reference, approximation, torch.float64)
    if signal == 0:
        return 0.0 if noise == 0 else math.inf
    return math.sqrt(noise / signal)


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    """Signal to quantization noise in decibels, 10 log10(signal / noise); inf if equal."""
    error = relative_error(reference, approximation)
    return math.inf if error == 0 else -20 * math.log10(error) if error < math.inf else -math.inf


def clip_rate(x: Tensor, limit: float) -> float:
    """Share of elements whose magnitude is beyond the limit."""
    clipped = sum(int((part.abs() > limit).sum()) for (part,) in _chunks(x))
    return clipped / max(x.numel(), 1)


def zero_rate(reference: Tensor, approximation: Tensor) -> float:
    """Share of elements that are not zero but became zero."""
    lost = sum(int(((b == 0) & (a != 0)).sum()) for a, b in _chunks(reference, approximation))
    return lost / max(reference.numel(), 1)
