"""Whether the Hopper kernels take the sister models' real widths: by their rules, and compiled.

Nothing runs on a GPU here; `test_cuda_decoder.py` has a layer of each width for who has one.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from halfbyte.checkpoint.metadata import Quantization
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.config import ModelConfig
from halfbyte.errors import UnsupportedError, UsageError
from halfbyte.kernels.cuda import library
from halfbyte.kernels.cuda.compiler import load_nvrtc
from halfbyte.kernels.cuda.library import HeadShape
from halfbyte.kernels.repack import K_BLOCK, TILE_ROWS, padded
from halfbyte.model.cuda.decode import norm_blocks
from halfbyte.model.cuda.load import reason_against
from halfbyte.model.parallel import check_size, shard_of
from halfbyte.modules import decoder_linears, fused_partners
from halfbyte.recipe.fitted import fitted_recipe
from halfbyte.recipe.plan import make_plan
from sisters import SISTERS, Sister, write_hollow


def few_layers(sister: Sister) -> ModelConfig:
    """The real widths, of six layers and without the tower, which runs in torch's own products."""
    config = sister.config
    return ModelConfig(replace(config.text, num_layers=6), None)


def widths_that_split(config: ModelConfig) -> list[int]:
    found = []
    for size in (1, 2, 4, 8):
        try:
            check_size(config.text, size)
        except UsageError:
            continue
        found.append(size)
    return found


@pytest.mark.parametrize("sister", SISTERS, ids=str)
def test_kernels_take_the_real_widths(sister: Sister, tmp_path: Path) -> None:
    config = few_layers(sister)
    plan = make_plan(fitted_recipe(config).recipe, config)
    assert set(plan.formats.values()) == {"fp8", "nvfp4"}
    write_hollow(tmp_path / "m", config, Quantization("modelopt", plan.formats, plan.kv_cache))
    checkpoint = Checkpoint.open(tmp_path / "m")
    assert widths_that_split(config) == [1, 2, 4, 8]
    for size in widths_that_split(config):
        for products in ("exact", "fast"):
            reason = reason_against(checkpoint, "fp8", 16, products=products, num_ranks=size)
            assert reason is None, (size, products, reason)
    # The rules do refuse: other pages and a cache that is not FP8.
    assert reason_against(checkpoint, "bf16", 16) is not None
    assert reason_against(checkpoint, "fp8", 24) is not None


@pytest.mark.parametrize("sister", SISTERS, ids=str)
def test_no_weight_is_padded(sister: Sister) -> None:
    """Rows of what is one product are whole tiles, inputs whole K blocks, in every format."""
    config = few_layers(sister)
    rows: dict[tuple[str, ...], int] = {}
    for linear in decoder_linears(config)[:7]:
        group = tuple(name.rpartition(".")[2] for name in fused_partners(linear.name))
        rows[group] = rows.get(group, 0) + linear.out_features
        for block in K_BLOCK.values():
            assert padded(linear.in_features, block) == linear.in_features, linear.name
    assert len(rows) == 4
    for group, count in rows.items():
        assert padded(count, TILE_ROWS) == count, group


def head_shapes() -> set[HeadShape]:
    found = set()
    for sister in SISTERS:
        config = few_layers(sister)
        for size in widths_that_split(config):
            local = shard_of(config.text, 0, size).local(config.text)
            found.add(HeadShape(local.head_dim, local.num_heads, local.num_kv_heads))
    return found


def test_attention_fits_a_block() -> None:
    """Shared memory of decode attention, as `KernelLibrary.attention` asks for it."""
    for heads in head_shapes():
        group = heads.num_heads // heads.num_kv_heads
        assert group in (4, 12)
        for num_warps in (2, 4, 8):
            merged = num_warps * group * (heads.head_dim + 2) * 4
            ring = num_warps * library._ATTENTION_STAGES * 2 * 16 * heads.head_dim
            assert max(merged, ring) <= 227 * 1024


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_kernels_compile_for_the_real_widths(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every kernel whose source depends on widths or heads; those of products do not."""
    try:
        load_nvrtc()
    except UnsupportedError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    outs: tuple[library.OutKind, ...] = ("f16", "e4m3", "bf16")
    tasks: list[Callable[[], bytes]] = []
    widths = set()
    for sister in SISTERS:
        text = few_layers(sister).text
        widths.add((text.width, text.mlp_width, text.head_dim, text.num_heads, text.num_kv_heads))
    assert len(widths) == 5
    for width, mlp_width, head_dim, num_heads, num_kv_heads in sorted(widths):
        heads = HeadShape(head_dim, num_heads, num_kv_heads)
        for columns in (8, 128):
            blocks = norm_blocks(columns)
            tasks.append(partial(library.elementwise_code, width, mlp_width, blocks, heads))
    for heads in sorted(head_shapes(), key=str):
        tasks.append(partial(library.chunk_attention_code, heads, 16))
        tasks += [
            partial(library.attention_code, heads, 16, out, num_warps)
            for num_warps in (2, 4, 8)
            for out in outs
        ]
    codes = [task() for task in tasks]
    assert all(code[:4] == b"\x7fELF" for code in codes)
