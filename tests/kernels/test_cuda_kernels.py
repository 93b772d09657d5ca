"""Each CUDA kernel against its twin or float64, on a GPU: every element written, edges included."""

import ctypes
from dataclasses import replace
from functools import lru_cache

import pytest
import torch

from halfbyte.formats.minifloat import decode_e2m1
from halfbyte.kernels import repack
from halfbyte.kernels.cuda.driver import Launch, LinearResult
from halfbyte.kernels.cuda.library import HeadShape, KernelLibrary, choose_config, columns_for
from halfbyte.kernels.cuda.ops import prefill_product, stream_product
from halfbyte.kernels.paged import PagedContext
from halfbyte.model.cuda.launches import (
    CHUNK_KEYS,
    CHUNK_ROWS,
    chunk_splits,
    chunk_tiles,
    count_grid,
)

# Untyped: fixtures and cases come from parameters; needs a device to run at all.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="arg-type"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def library():
    return KernelLibrary(torch.device("cuda"))


@lru_cache
def _weight(format_: str, rows: int, columns: int):
    """A tiled weight of all codes and scales, and its values in float64, on the device."""
    generator = torch.Generator().manual_seed(rows + columns)
    scale = (torch.rand(rows, generator=generator) + 0.5).cuda()
    if format_ in ("nvfp4", "nvfp4_fast"):
        shape = (rows, columns // 2)
        codes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).cuda()
        shape = (rows, columns // 16)
        scales = torch.randint(1, 0x7F, shape, dtype=torch.uint8, generator=generator).cuda()
        scales = scales.view(torch.float8_e4m3fn)
        if format_ == "nvfp4_fast":
            tiled = repack.tile_nvfp4(codes, scales, scale, is_fast=True)
            values = repack.fast_values(tiled).double() * tiled.row_scale_O.double()[:, None]
            return tiled, values[:rows, :columns]
        tiled = repack.tile_nvfp4(codes, scales, scale)
        unpacked = torch.stack((codes & 15, codes >> 4), -1).reshape(rows, columns)
        wide = decode_e2m1(unpacked).double() * scales.double().repeat_interleave(16, 1)
        return tiled, wide * scale.double()[:, None]
    w = torch.randn(rows, columns, generator=generator).cuda()
    w = w.to(torch.float8_e4m3fn if format_ == "fp8" else torch.bfloat16)
    return repack.tile_rows(w, scale, format_), w.double() * scale.double()[:, None]


def _activations(format_: str, tokens: int, columns: int) -> torch.Tensor:
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens))
    dtype = {"nvfp4": torch.float16, "bf16": torch.bfloat16}.get(format_, torch.float8_e4m3fn)
    return x.to(dtype).cuda()


def _error(y: torch.Tensor, expected: torch.Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("format_", ["nvfp4", "fp8", "bf16"])
@pytest.mark.parametrize("tokens", [1, 8, 9, 16, 17, 33, 64, 65, 128])
def test_streaming_linear(library, format_: str, tokens: int) -> None:
    for rows, columns in ((256, 128), (1024, 4096), (600, 1040), (12288, 1536)):
        tiled, exact = _weight(format_, rows, columns)
        x = _activations(format_, tokens, columns)
        y = stream_product(library, tiled, x)[:, :rows]
        # f32 sums; FP8 products add 128 terms with about 14 bits before they reach f32.
        bound = 1e-3 if format_ == "fp8" else 2e-6
        assert _error(y, x.double() @ exact.t()) < bound, (rows, columns)


@pytest.mark.parametrize("tokens", [1, 8, 9, 17, 33, 64, 65, 128])
def test_streaming_linear_in_fp8(library, tokens: int) -> None:
    for rows, columns in ((256, 128), (1024, 4096), (600, 1040)):
        tiled, rounded = _weight("nvfp4_fast", rows, columns)
        x = _activations("nvfp4_fast", tokens, columns)
        y = stream_product(library, tiled, x)[:, :rows]
        assert _error(y, x.double() @ rounded.t()) < 1e-3, (rows, columns)


@pytest.mark.parametrize("format_", ["nvfp4", "fp8", "bf16", "nvfp4_fast"])
@pytest.mark.parametrize("tokens", [64, 128])
def test_blocks_of_a_cluster_share_activations(library, format_: str, tokens: int) -> None:
    tiled, _ = _weight(format_, 1024, 4096)
    x = _activations(format_, tokens, 4096)
    alone = choose_config(format_, columns_for(tokens))
    alone = replace(alone, promote=4)
    together = replace(alone, cluster=2)
    y = stream_product(library, tiled, x, config=together)
    expected = stream_product(library, tiled, x, config=alone)
    # The same terms; only where the work is cut along K differs.
    assert _error(y, expected.double()) < (1e-3 if x.element_size() == 1 else 2e-6)


@pytest.mark.parametrize("format_", ["nvfp4", "fp8", "bf16", "nvfp4_fast"])
@pytest.mark.parametrize("tokens", [1, 33, 128])
def test_a_ring_is_filled_many_times(library, format_: str, tokens: int) -> None:
    """What the copier may overwrite too soon: 32 K blocks and more for each block of the grid."""
    tiled, values = _weight(format_, 33792, 1024)
    x = _activations(format_, tokens, 1024)
    y = stream_product(library, tiled, x)[:, :33792]
    assert _error(y, x.double() @ values.t()) < (1e-3 if x.element_size() == 1 else 2e-6)


@pytest.mark.parametrize("format_", ["nvfp4", "nvfp4_fast", "fp8"])
@pytest.mark.parametrize("tokens", [1, 128, 129, 255, 256, 257, 384, 385, 2300])
def test_prefill_linear(library, format_: str, tokens: int) -> None:
    """Tokens that end in a narrow tile, in a wide one, and exactly."""
    for rows, columns in ((256, 128), (1024, 4096), (600, 1040)):
        tiled, values = _weight(format_, rows, columns)
        x = _activations(format_, tokens, columns)
        y = prefill_product(library, tiled, x)  # into NaN
        # Rounded to bf16; sums of FP8 products have about 14 bits.
        bound = 1e-2 if format_ == "fp8" else 3e-3
        assert _error(y[:, :rows], x.double() @ values.t()) < bound, (rows, columns)
        assert torch.equal(y, prefill_product(library, tiled, x))


def _plain_result(y_TO: torch.Tensor) -> LinearResult:
    return LinearResult(out=y_TO.data_ptr(), stride=y_TO.shape[1])


def _launch(kernel, grid, threads: int, *arguments, cluster: int = 1) -> None:
    launch = Launch(kernel, grid, threads, arguments, cluster=cluster, overlaps=False)
    launch.run(torch.cuda.current_stream().cuda_stream)


def _as_stored(x: torch.Tensor, kind: str, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """What a kernel of this kind writes for bf16 rows, and the scale of each row."""
    if kind in ("e4m3_token", "e4m3_paired"):
        largest = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-12)
        # By a number, torch's CUDA division would multiply by the rounded inverse.
        scales = largest / torch.full_like(largest, 448.0)
        codes = (x.float() / scales).to(torch.float8_e4m3fn)
        return repack.pair_activations(codes) if kind == "e4m3_paired" else codes, scales[:, 0]
    if kind == "e4m3":
        return (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn), x.new_zeros(0)
    if kind == "f16":
        return (x.float() * scale).to(torch.float16), x.new_zeros(0)
    return x, x.new_zeros(0)


KINDS = ["f16", "e4m3", "bf16", "e4m3_token", "e4m3_paired"]


def _share_of_equal(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Share of equal elements; none may be NaN, and none off by more than a rounding step."""
    a, b = got.float(), wanted.float()
    assert bool(torch.isfinite(a).all())
    step = 2.0**-3 if got.element_size() == 1 else 2.0**-7
    assert bool(((a - b).abs() <= step * b.abs().clamp(min=2.0**-6)).all())
    return float((a == b).float().mean())


@pytest.mark.parametrize(
    ("head_dim", "heads", "kv_heads"), [(128, 96, 8), (128, 8, 8), (64, 20, 4), (128, 32, 2)]
)
@pytest.mark.parametrize("start", [0, 1, 127, 128, 1000, 5003])
@pytest.mark.parametrize("tokens", [1, 11, 16, 64, 129, 300])
def test_chunk_attention(
    library, head_dim: int, heads: int, kv_heads: int, start: int, tokens: int
) -> None:
    """Against float64, with whole contexts and split ones; what lies past the context is NaN."""
    generator = torch.Generator().manual_seed(start + tokens)
    context = start + tokens
    num_pages = -(-context // 16) + 1
    table = torch.randperm(num_pages, generator=generator).int()
    shape = (num_pages, 16, kv_heads, head_dim)
    k = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    v = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    for cache in (k, v):
        for position in range(context, num_pages * 16):
            cache.view(torch.uint8)[table[position // 16], position % 16] = 0x7F
    q = torch.randn(tokens, heads, head_dim, generator=generator).bfloat16()
    scale, group = 0.11, heads // kv_heads
    keys, values = (c.double()[table.long()].flatten(0, 1)[:context].cuda() for c in (k, v))
    queries = q.double().cuda().view(tokens, kv_heads, group, head_dim)
    scores = torch.einsum("tkgh,ckh->kgtc", queries, keys) * scale
    behind = torch.arange(context) > start + torch.arange(tokens)[:, None]
    weights = scores.masked_fill(behind.cuda(), -torch.inf).softmax(-1)
    expected = torch.einsum("kgtc,ckh->tkgh", weights, values).reshape(tokens, heads, head_dim)
    num_tiles = chunk_tiles(tokens, group)
    kernels = library.chunk_attention(HeadShape(head_dim, heads, kv_heads), 16)
    counters = torch.zeros(num_tiles * kv_heads, dtype=torch.int32, device="cuda")
    blocks = -(-context // CHUNK_KEYS)
    laid_out = torch.full(
        (2, kv_heads, blocks * CHUNK_KEYS, head_dim), torch.nan, dtype=torch.float16, device="cuda"
    )
    stored = [cache.view(torch.uint8).cuda() for cache in (k, v)]
    _launch(
        kernels["lay_out_context"],
        (blocks, kv_heads, 2),
        128,
        *stored,
        table.cuda(),
        context,
        laid_out,
    )
    for splits in {1, 3, chunk_splits(num_tiles * kv_heads, context, 132)}:
        room = num_tiles * kv_heads * splits * CHUNK_ROWS * (head_dim + 2)
        workspace = torch.full((room,), torch.nan, device="cuda")
        outs = []
        for _ in range(2):
            out = torch.full_like(q, torch.nan, device="cuda")
            _launch(
                kernels["chunk_attention"],
                (num_tiles, kv_heads, splits),
                384,
                q.cuda(),
                laid_out,
                start,
                tokens,
                scale * 1.4426950408889634,
                workspace,
                counters,
                out,
            )
            outs.append(out)
        assert _error(outs[0], expected) < 4e-3, splits  # rounded to bf16
        assert torch.equal(*outs)
        assert not counters.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blocks", [1, 2, 8])
@pytest.mark.parametrize("is_tiled", [False, True])
def test_norm_and_silu_are_their_twins(library, kind: str, blocks: int, is_tiled: bool) -> None:
    width, mlp_width, tokens = 1024, 1536, 37
    kernels = library.elementwise(width, mlp_width, blocks, HeadShape(128, 8, 2))
    generator = torch.Generator().manual_seed(blocks)
    residual = torch.randn(tokens, width, generator=generator).bfloat16().cuda()
    delta = torch.randn(tokens, width, generator=generator).bfloat16().cuda()
    weight = (1 + 0.1 * torch.randn(width, generator=generator)).bfloat16().cuda()
    gate_up = (2 * torch.randn(tokens, 2 * mlp_width, generator=generator)).bfloat16().cuda()
    per_token = kind in ("e4m3_token", "e4m3_paired")
    scale = 0.05 if kind == "e4m3" else 0.5

    def room(features: int):
        element = 1 if kind.startswith("e4m3") else 2
        rows = tokens if not is_tiled else 40
        data = torch.full((rows * features * element,), 0xFF, dtype=torch.uint8, device="cuda")
        strides = (rows * 16, 16) if is_tiled else (16, features * element)
        return data, [ctypes.c_int64(stride) for stride in strides]

    def rows_of(data: torch.Tensor, features: int, like: torch.Tensor) -> torch.Tensor:
        if is_tiled:
            data = data.view(-1, 40, 16)[:, :tokens].transpose(0, 1).contiguous()
        return data.view(-1).view(like.dtype).view(tokens, features)

    token_scale = torch.full((tokens,), torch.nan, device="cuda")
    data, strides = room(width)
    threads = 512 if blocks == 1 else 256
    summed = residual.clone()
    arguments = (_plain_result(delta), summed, weight, 1e-5, data, *strides, scale, token_scale)
    name = f"add_norm_{kind}"
    _launch(kernels[name], (blocks, tokens, 1), threads, *arguments, cluster=blocks)
    expected = (residual.float() + delta.float()).bfloat16()
    assert torch.equal(summed, expected)
    wide = expected.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * weight.float()
    stored, scales = _as_stored(normed.bfloat16(), kind, scale)
    assert _share_of_equal(rows_of(data, width, stored), stored) > 0.98
    if per_token:
        assert torch.allclose(token_scale, scales.float(), rtol=2.0**-7)

    data, strides = room(mlp_width)
    token_scale.fill_(torch.nan)
    result = _plain_result(gate_up)
    name = f"silu_mul_{kind}"
    if per_token:
        arguments = (result, mlp_width, data, *strides, scale, token_scale)
        _launch(kernels[name], (blocks, tokens, 1), 512, *arguments, cluster=blocks)
    else:
        grid = (-(-mlp_width // 2048), tokens, 1)
        if blocks == 1:
            grid = (-(-mlp_width // 256), -(-tokens // 8), 1)
        _launch(kernels[name], grid, 256, result, mlp_width, data, *strides, scale, tokens)
    gate, up = gate_up.float().chunk(2, -1)
    stored, scales = _as_stored((torch.nn.functional.silu(gate) * up).bfloat16(), kind, scale)
    assert _share_of_equal(rows_of(data, mlp_width, stored), stored) > 0.98
    if per_token:
        assert torch.allclose(token_scale, scales.float(), rtol=2.0**-7)


@pytest.mark.parametrize("kind", ["f16", "e4m3", "e4m3_token", "e4m3_paired"])
@pytest.mark.parametrize("blocks", [1, 2, 8])
@pytest.mark.parametrize("is_tiled", [False, True])
@pytest.mark.parametrize(("head_dim", "heads"), [(128, 96), (128, 9), (64, 5)])
def test_attention_s_output_is_written_as_an_o_reads_it(
    library, kind: str, blocks: int, is_tiled: bool, head_dim: int, heads: int
) -> None:
    """Exact: the same rounding of the same numbers, and the padding behind them is left alone."""
    width, tokens, gain = head_dim * heads, 37, 0.37
    kernels = library.elementwise(1024, 1536, blocks, HeadShape(head_dim, heads, 1))
    generator = torch.Generator().manual_seed(width)
    sizes = torch.logspace(-6, 3, tokens)[:, None]
    x = (torch.randn(tokens, width, generator=generator) * sizes).bfloat16().cuda()
    x[3] = 0.0
    scale = 0.05 if kind == "e4m3" else 0.5
    stored, scales = _as_stored((x.float() * gain).bfloat16(), kind, scale)
    stored = stored.clamp(-65504, 65504) if kind == "f16" else stored
    rows, element = 40 if is_tiled else tokens, stored.element_size()
    data = torch.full((rows * width * element,), 0xFF, dtype=torch.uint8, device="cuda")
    strides = [ctypes.c_int64(s) for s in ((rows * 16, 16) if is_tiled else (16, width * element))]
    if kind in ("e4m3_token", "e4m3_paired"):
        token_scale = torch.full((tokens,), torch.nan, device="cuda")
        arguments = (x, gain, data, *strides, scale, token_scale)
        threads = 512 if blocks == 1 else 256
        grid = (blocks, tokens, 1)
        _launch(kernels[f"quantize_{kind}"], grid, threads, *arguments, cluster=blocks)
        assert torch.equal(token_scale, scales.float())
    else:
        grid = (-(-width // 2048), tokens, 1)
        _launch(kernels[f"quantize_{kind}"], grid, 256, x, width, gain, data, *strides, scale)
    if is_tiled:
        chunks = data.view(-1, 40, 16)
        assert bool((chunks[:, tokens:] == 0xFF).all())
        data = chunks[:, :tokens].transpose(0, 1).contiguous()
    found = data.view(-1).view(stored.dtype).view(tokens, width)
    assert torch.equal(found.view(torch.uint8), stored.view(torch.uint8))


@pytest.mark.parametrize("is_tiled", [False, True])
@pytest.mark.parametrize("features", [16, 192, 304, 12288, 28672])
def test_largest_codes_are_counted(library, is_tiled: bool, features: int) -> None:
    tokens, width = 37, repack.padded(features, 128)
    generator = torch.Generator().manual_seed(features)
    codes = torch.randint(0, 256, (tokens, features), dtype=torch.uint8, generator=generator)
    codes[:, ::7] = 0x7E
    codes[1::2, 5] = 0xFE
    rows = torch.zeros(tokens, width, dtype=torch.uint8)
    rows[:, :features] = codes
    data = (repack.tile_activations(rows, 40) if is_tiled else rows).contiguous().cuda()
    strides = [ctypes.c_int64(s) for s in ((40 * 16, 16) if is_tiled else (16, width))]
    slots = torch.arange(tokens).where(torch.arange(tokens) % 5 > 0, -1)
    is_image = (torch.arange(tokens) % 3 == 0).to(torch.uint8)
    counts = torch.zeros(2, 2, dtype=torch.int64, device="cuda")
    arguments = (data, *strides, features, slots.cuda(), is_image.cuda(), counts)
    for _ in range(2):
        _launch(library.count_largest(), count_grid(features, tokens), 128, *arguments)
    largest = ((codes & 0x7F) == 0x7E).sum(-1)
    for row in range(2):
        mine = (slots >= 0) & (is_image == row)
        expected = [2 * int(largest[mine].sum()), 2 * int(mine.sum()) * features]
        assert counts[row].tolist() == expected


def test_two_products_are_bit_identical(library) -> None:
    tiled, _ = _weight("nvfp4", 1024, 4096)
    x = torch.randn(16, 4096, dtype=torch.float16, device="cuda")
    assert torch.equal(stream_product(library, tiled, x), stream_product(library, tiled, x))


@pytest.mark.parametrize("rows,columns", [(256, 128), (512, 1536)])
def test_decoding_to_rows_is_exact(library, rows: int, columns: int) -> None:
    def run(name: str, tiled, target, *extra) -> None:
        k_blocks = tiled.num_k_blocks
        arguments = (
            tiled.data,
            target,
            k_blocks,
            ctypes.c_int64(target.stride(0) * target.element_size()),
            *extra,
        )
        grid = (k_blocks, tiled.data.shape[0], 1)
        Launch(library.layout()[name], grid, 128, arguments, overlaps=False).run(
            torch.cuda.current_stream().cuda_stream
        )

    tiled, exact = _weight("nvfp4", rows, columns)
    exact = exact / (tiled.row_scale_O.double() / 256.0)[:, None]
    target = torch.full((rows, columns), float("nan"), dtype=torch.bfloat16, device="cuda")
    run("decode_nvfp4_bf16", tiled, target, 256.0)
    assert torch.allclose(target.double(), exact, rtol=1e-7, atol=0)
    codes = torch.full((rows, columns), float("nan"), device="cuda").to(torch.float8_e4m3fn)
    tiled, _ = _weight("nvfp4_fast", rows, columns)
    run("decode_nvfp4_e4m3", tiled, codes)
    assert torch.equal(codes.float(), repack.fast_values(tiled).float())  # -0 and 0 are equal
    tiled, _ = _weight("fp8", rows, columns)
    run("untile_8bit", tiled, codes)
    assert torch.equal(codes.view(torch.uint8), repack.untile_rows(tiled).view(torch.uint8))


@pytest.mark.parametrize("head_dim,heads,kv_heads", [(128, 96, 8), (128, 8, 2), (64, 9, 3)])
@pytest.mark.parametrize("splits,warps", [(1, 8), (3, 8), (32, 8), (1, 2), (2, 4)])
def test_decode_attention(
    library, head_dim: int, heads: int, kv_heads: int, splits: int, warps: int
) -> None:
    from halfbyte.kernels import reference

    lengths = torch.tensor([1, 15, 16, 17, 128, 129, 700, 2047], dtype=torch.int32)
    sequences, pages = len(lengths), 128
    generator = torch.Generator().manual_seed(2)
    table = torch.randperm(sequences * pages, generator=generator).int().view(sequences, pages)
    shape = (sequences * pages, 16, kv_heads, head_dim)
    k = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    v = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    for s, length in enumerate(lengths.tolist()):  # what lies past the context is NaN
        for cache in (k, v):
            flat = cache.view(torch.uint8)
            for position in range(length, min(length + 40, pages * 16)):
                flat[table[s, position // 16], position % 16] = 0x7F
    q = torch.randn(sequences, heads, head_dim, generator=generator).bfloat16()
    starts = torch.arange(sequences + 1, dtype=torch.int32)
    context = PagedContext(k, v, 0.5, 0.25, table, lengths, starts, 0.09)
    expected = reference.paged_attention(q, context)
    kernel = library.attention(HeadShape(head_dim, heads, kv_heads), 16, "bf16", warps)
    group = heads // kv_heads
    workspace = torch.full(
        (sequences * kv_heads * splits * group * (head_dim + 2),), float("nan"), device="cuda"
    )
    counters = torch.zeros(sequences * kv_heads, dtype=torch.int32, device="cuda")
    out = torch.full(
        (sequences, heads * head_dim), float("nan"), dtype=torch.bfloat16, device="cuda"
    )
    arguments = (
        q.cuda(),
        k.cuda().view(torch.uint8),
        v.cuda().view(torch.uint8),
        table.cuda(),
        pages,
        lengths.cuda(),
        0.09 * 0.5 * 1.4426950408889634,
        0.25,
        workspace,
        counters,
        out,
        ctypes.c_int64(16),
        ctypes.c_int64(heads * head_dim * 2),
        1.0,
    )
    launch = Launch(kernel, (splits, kv_heads, sequences), warps * 32, arguments, overlaps=False)
    for _ in range(2):  # the counters must come back to zero
        launch.run(torch.cuda.current_stream().cuda_stream)
    got = out.cpu().view(sequences, heads, head_dim)
    error = (got.double() - expected.double()).norm() / expected.double().norm()
    assert error < 3e-3, float(error)  # bf16 outputs: half a step is 2e-3
    assert not counters.any()
    # For an NVFP4 `o`: fp16 of the same bf16 values, halved, in chunks of 16 bytes a token.
    kernel = library.attention(HeadShape(head_dim, heads, kv_heads), 16, "f16", warps)
    tiled = torch.full((heads * head_dim // 8, 8, 16), 0xFF, dtype=torch.uint8, device="cuda")
    arguments = (*arguments[:10], tiled, ctypes.c_int64(8 * 16), ctypes.c_int64(16), 0.5)
    launch = Launch(kernel, (splits, kv_heads, sequences), warps * 32, arguments, overlaps=False)
    launch.run(torch.cuda.current_stream().cuda_stream)
    halves = repack.untile_activations(tiled, 8, sequences, heads * head_dim, torch.float16)
    assert torch.equal(halves, (out.float() * 0.5).half())
