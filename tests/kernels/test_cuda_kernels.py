"""Each CUDA kernel against its twin or float64, on a GPU: every element written, edges included."""

import ctypes

import pytest
import torch

from halfbyte.kernels import repack

# Untyped: fixtures and cases come from parameters; needs a device to run at all.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="arg-type"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def library():
    from halfbyte.kernels.cuda.library import KernelLibrary

    return KernelLibrary(torch.device("cuda"))


def _weight(format_: str, rows: int, columns: int):
    generator = torch.Generator().manual_seed(rows + columns)
    scale = torch.rand(rows, generator=generator) + 0.5
    if format_ == "nvfp4":
        codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=generator)
        scales = torch.randint(
            1, 0x7F, (rows, columns // 16), dtype=torch.uint8, generator=generator
        )
        tiled = repack.tile_nvfp4(
            codes.cuda(), scales.view(torch.float8_e4m3fn).cuda(), scale.cuda()
        )
        from halfbyte.formats.minifloat import decode_e2m1

        unpacked = torch.stack((codes & 15, codes >> 4), -1).reshape(rows, columns)
        wide = decode_e2m1(unpacked).double()
        wide = wide * scales.view(torch.float8_e4m3fn).double().repeat_interleave(16, 1)
        return tiled, wide * scale.double()[:, None]
    w = torch.randn(rows, columns, generator=generator)
    w = w.to(torch.float8_e4m3fn if format_ == "fp8" else torch.bfloat16)
    return repack.tile_rows(w.cuda(), scale.cuda(), format_), w.double() * scale.double()[:, None]


@pytest.mark.parametrize("format_", ["nvfp4", "fp8", "bf16"])
@pytest.mark.parametrize("tokens", [1, 8, 9, 16, 17, 33, 64, 65, 128])
def test_streaming_linear(library, format_: str, tokens: int) -> None:
    from halfbyte.kernels.cuda.ops import stream_product

    dtype = {"nvfp4": torch.float16, "fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16}[format_]
    for rows, columns in ((256, 128), (1024, 4096), (600, 1040), (12288, 1536)):
        tiled, exact = _weight(format_, rows, columns)
        x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)).to(dtype)
        y = stream_product(library, tiled, x.cuda())[:, :rows].double().cpu()
        expected = x.double() @ exact.t()
        error = (y - expected).norm() / expected.norm()
        # f32 sums; FP8 products add 128 terms with about 14 bits before they reach f32.
        assert error < (1e-3 if format_ == "fp8" else 2e-6), (rows, columns, float(error))


def test_two_products_are_bit_identical(library) -> None:
    from halfbyte.kernels.cuda.ops import stream_product

    tiled, _ = _weight("nvfp4", 1024, 4096)
    x = torch.randn(16, 4096, dtype=torch.float16, device="cuda")
    assert torch.equal(stream_product(library, tiled, x), stream_product(library, tiled, x))


@pytest.mark.parametrize("rows,columns", [(256, 128), (512, 1536)])
def test_decoding_to_rows_is_exact(library, rows: int, columns: int) -> None:
    from halfbyte.kernels.cuda.driver import Launch

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
    exact = exact / (tiled.row_scale_O.double().cpu() / 256.0)[:, None]
    target = torch.full((rows, columns), float("nan"), dtype=torch.bfloat16, device="cuda")
    run("decode_nvfp4_bf16", tiled, target, 256.0)
    assert torch.allclose(target.double().cpu(), exact, rtol=1e-7, atol=0)
    codes = torch.full((rows, columns), float("nan"), device="cuda").to(torch.float8_e4m3fn)
    run("decode_nvfp4_e4m3", tiled, codes, 32.0)
    wanted = (target.float() / 8.0).to(torch.float8_e4m3fn)
    assert torch.equal(codes.view(torch.uint8), wanted.view(torch.uint8))
    tiled, _ = _weight("fp8", rows, columns)
    run("untile_8bit", tiled, codes)
    assert torch.equal(codes.view(torch.uint8), repack.untile_rows(tiled).view(torch.uint8))


@pytest.mark.parametrize("head_dim,heads,kv_heads", [(128, 96, 8), (128, 8, 2), (64, 9, 3)])
@pytest.mark.parametrize("splits,warps", [(1, 8), (3, 8), (32, 8), (1, 2), (2, 4)])
def test_decode_attention(
    library, head_dim: int, heads: int, kv_heads: int, splits: int, warps: int
) -> None:
    from halfbyte.kernels import reference
    from halfbyte.kernels.cuda.driver import Launch
    from halfbyte.kernels.cuda.library import HeadShape

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
    expected = reference.paged_attention(
        q, k, v, 0.5, 0.25, table, lengths, torch.arange(sequences + 1, dtype=torch.int32), 0.09
    )
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
