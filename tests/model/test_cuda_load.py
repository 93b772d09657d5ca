"""The loader for the CUDA decoder, on the CPU: every tensor comes back from its units as stored."""

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.errors import CheckpointError
from halfbyte.formats.minifloat import decode_e2m1
from halfbyte.kernels.repack import fast_values, untile_nvfp4, untile_rows
from halfbyte.model.cuda.load import (
    f16_divisor,
    load_cuda_draft,
    load_cuda_weights,
    reason_against,
    reason_against_draft,
)
from halfbyte.model.cuda.read import TensorReader
from halfbyte.model.cuda.weights import CudaLinear
from halfbyte.model.parallel import shard_of
from halfbyte.model.tiny import tiny_config, write_tiny_checkpoint, write_tiny_eagle
from halfbyte.modules import Fp8Activations, WeightFormat
from hopper import (
    hopper_config,
    uniform_recipe,
    write_compressed,
    write_fp8,
    write_mixed,
    write_native,
)

CPU = torch.device("cpu")
# Everything in one format, the head included; and a head in one of its own.
NARROW: tuple[tuple[str, WeightFormat, WeightFormat], ...] = (
    ("nvfp4", "nvfp4", "nvfp4"),
    ("fp8-head", "nvfp4", "fp8"),
)
KINDS = ["bf16", "native", "fp8", "mixed", "nvfp4", "fp8-head", "compressed"]


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("hopper")
    config = hopper_config()
    write_tiny_checkpoint(folder / "bf16", config=config)
    return {
        "bf16": folder / "bf16",
        "native": write_native(folder / "native", folder / "bf16"),
        "fp8": write_fp8(folder / "fp8", config),
        "compressed": write_compressed(folder / "compressed", folder / "bf16", ignore=()),
        "mixed": write_mixed(folder / "mixed", folder / "fp8", folder),
        **{
            name: write_mixed(folder / name, folder / "fp8", folder, uniform_recipe(each, head))
            for name, each, head in NARROW
        },
    }


def decoded(linear: CudaLinear) -> torch.Tensor:
    """The numbers of a tiled weight, padding included."""
    weight = linear.weight
    if weight.format == "nvfp4":
        codes, scales = untile_nvfp4(weight)
        values = decode_e2m1(codes).double() * scales.double().repeat_interleave(16, 1) / 256.0
    elif weight.format == "nvfp4_fast":
        values = fast_values(weight).double()
    else:
        values = untile_rows(weight).double()
    return values * weight.row_scale_O.double()[:, None]


def test_fast_weights_are_the_exact_ones_rounded_to_e4m3(variants: dict[str, Path]) -> None:
    checkpoint = Checkpoint.open(variants["mixed"])
    exact = load_cuda_weights(checkpoint, CPU, num_threads=3)
    fast = load_cuda_weights(checkpoint, CPU, num_threads=3, mode="fast")
    assert (exact.mode, fast.mode) == ("exact", "fast")
    assert fast.num_bytes == exact.num_bytes
    formats = set()
    for ours, theirs in zip(fast.layers, exact.layers, strict=True):
        for a, b in ((ours.gate_up, theirs.gate_up), (ours.down, theirs.down)):
            formats.add((a.weight.format, b.weight.format))
            if b.weight.format != "nvfp4":
                assert torch.equal(a.weight.data, b.weight.data)
                continue
            values, wanted = decoded(a), decoded(b)
            largest_O1 = wanted.abs().amax(1, keepdim=True)
            bound = torch.maximum(wanted.abs() * 2.0**-4, largest_O1 * 2.0**-10)
            assert bool(((values - wanted).abs() <= bound * 1.0001).all())
            assert not torch.equal(values, wanted)
    assert formats == {("fp8", "fp8"), ("nvfp4_fast", "nvfp4")}


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_together_hold_what_one_device_holds(kind: str, variants: dict[str, Path]) -> None:
    """Each rank's numbers are the whole's rows or columns; what it reads is its part."""
    checkpoint = Checkpoint.open(variants[kind])
    text = checkpoint.config.text
    whole = load_cuda_weights(checkpoint, CPU, num_threads=3)
    shards = [shard_of(text, rank, 2) for rank in range(2)]
    ranks = [load_cuda_weights(checkpoint, CPU, num_threads=3, shard=one) for one in shards]
    for index, layer in enumerate(whole.layers):
        parts = [rank.layers[index] for rank in ranks]
        qkv, gate_up = decoded(layer.qkv), decoded(layer.gate_up)
        heads, kv, size = text.num_heads, text.num_kv_heads, text.head_dim
        members = torch.split(qkv[: (heads + 2 * kv) * size], [heads * size, kv * size, kv * size])
        for shard, part in zip(shards, parts, strict=True):
            q, k = shard.heads, shard.kv_heads
            wanted = [members[0][q.start * size : q.stop * size]]
            wanted += [member[k.start * size : k.stop * size] for member in members[1:]]
            rows = torch.cat(wanted)
            assert torch.equal(decoded(part.qkv)[: len(rows)], rows)
            m, width = shard.mlp, text.mlp_width
            rows = torch.cat((gate_up[m.start : m.stop], gate_up[width + m.start : width + m.stop]))
            assert torch.equal(decoded(part.gate_up)[: len(rows)], rows)
            columns = decoded(layer.o)[:, q.start * size : q.stop * size]
            assert torch.equal(decoded(part.o)[:, : len(q) * size], columns)
            assert torch.equal(decoded(part.down)[:, : len(m)], decoded(layer.down)[:, m])
            assert part.qkv.input_scale == layer.qkv.input_scale
    for shard, rank in zip(shards, ranks, strict=True):
        assert torch.equal(rank.embedding_VD[:-1], whole.embedding_VD[shard.vocab])
        assert not rank.embedding_VD[-1].any()
        head = decoded(rank.head)[: len(shard.vocab)]
        assert torch.equal(head, decoded(whole.head)[shard.vocab])
        assert rank.config.vocab_size == text.vocab_size and rank.num_logits == len(shard.vocab)


def test_columns_of_long_rows_are_read_without_the_others(tmp_path: Path) -> None:
    text = replace(hopper_config().text, mlp_width=8192, num_layers=1)
    write_tiny_checkpoint(tmp_path / "wide", config=replace(hopper_config(), text=text))
    stored = Checkpoint.open(tmp_path / "wide").stored("decoder.0.mlp.down.weight")
    target = torch.empty(stored.shape[0], 4096, dtype=torch.bfloat16)
    # Pieces of three rows, the last one shorter.
    with TensorReader(CPU, num_threads=2, piece_bytes=3 * 8192 + 5) as reader:
        reader.wait(reader.read_into(stored, target, range(8192, 16384)))
        assert reader.num_bytes == stored.num_bytes // 2
    whole = Checkpoint.open(tmp_path / "wide").tensor("decoder.0.mlp.down.weight")
    assert torch.equal(target, whole[:, 4096:])


def check_linear(checkpoint: Checkpoint, linear: CudaLinear, group: list[str]) -> None:
    wanted = torch.cat([checkpoint.decoded(name, torch.float32) for name in group]).double()
    found = decoded(linear)
    rows, columns = wanted.shape
    assert torch.allclose(found[:rows, :columns], wanted, rtol=3e-7, atol=0.0)
    assert not found[rows:].any() and not found[:, columns:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_survives_the_way_to_the_device(kind: str, variants: dict[str, Path]) -> None:
    checkpoint = Checkpoint.open(variants[kind])
    weights = load_cuda_weights(checkpoint, CPU, num_threads=3, num_spare_embeddings=5)
    text = checkpoint.config.text
    for index, layer in enumerate(weights.layers):
        attention, mlp = f"decoder.{index}.attention", f"decoder.{index}.mlp"
        check_linear(checkpoint, layer.qkv, [f"{attention}.{n}" for n in "qkv"])
        check_linear(checkpoint, layer.o, [f"{attention}.o"])
        check_linear(checkpoint, layer.gate_up, [f"{mlp}.gate", f"{mlp}.up"])
        check_linear(checkpoint, layer.down, [f"{mlp}.down"])
        norm = checkpoint.tensor(f"decoder.{index}.mlp_norm.weight")
        assert torch.equal(layer.mlp_norm_D, norm.bfloat16())
        if f"{attention}.k_scale" in checkpoint:
            assert layer.k_scale == checkpoint.scalar(f"{attention}.k_scale")
        if kind == "compressed":
            assert layer.qkv.input_scale is None
        elif layer.qkv.weight.format == "fp8":
            declared = [checkpoint.scalar(f"{attention}.{n}.input_scale") for n in "qkv"]
            assert layer.qkv.input_scale == max(declared)
    embedding = checkpoint.tensor("embedding.weight")
    assert torch.equal(weights.embedding_VD[: text.vocab_size], embedding)
    assert not weights.embedding_VD[text.vocab_size :].any()
    assert len(weights.embedding_VD) == text.vocab_size + 5
    check_linear(checkpoint, weights.head, ["head"])
    assert weights.head.weight.format == checkpoint.format_of("head")


@pytest.mark.parametrize("dialect", ["none", "mistral-fp8"])
def test_a_draft_model_borrows_its_targets_ends(
    dialect: Literal["none", "mistral-fp8"], variants: dict[str, Path], tmp_path: Path
) -> None:
    target = load_cuda_weights(Checkpoint.open(variants["mixed"]), CPU, num_threads=3)
    write_tiny_eagle(tmp_path / "head", hopper_config(), dialect=dialect)
    checkpoint = Checkpoint.open_eagle(tmp_path / "head")
    assert reason_against_draft(checkpoint, 16) is None
    draft = load_cuda_draft(checkpoint, target, num_threads=3)
    assert draft.embedding_VD is target.embedding_VD and draft.head is target.head
    assert draft.fuse is not None and len(draft.layers) == 2
    groups: list[tuple[CudaLinear, list[str]]] = [(draft.fuse, ["eagle.fuse"])]
    for index, layer in enumerate(draft.layers):
        attention, mlp = f"decoder.{index}.attention", f"decoder.{index}.mlp"
        groups += [
            (layer.qkv, [f"{attention}.{short}" for short in ("q", "k", "v")]),
            (layer.o, [f"{attention}.o"]),
            (layer.gate_up, [f"{mlp}.gate", f"{mlp}.up"]),
            (layer.down, [f"{mlp}.down"]),
        ]
    for linear, names in groups:
        check_linear(checkpoint, linear, names)
        assert linear.weight.format == ("bf16" if dialect == "none" else "fp8")
        if dialect == "mistral-fp8":
            scales = [checkpoint.scalar(f"{name}.input_scale") for name in names]
            assert linear.input_scale == max(scales)
    own = [linear.weight.num_bytes for linear, _ in groups]
    norms = [
        draft.norm_D,
        *(n for la in draft.layers for n in (la.attention_norm_D, la.mlp_norm_D)),
    ]
    assert draft.num_bytes == sum(own) + sum(norm.nbytes for norm in norms)


def test_a_draft_model_that_the_kernels_cannot_run_is_named(tmp_path: Path) -> None:
    write_tiny_eagle(tmp_path / "head", tiny_config(layers=1))
    reason = reason_against_draft(Checkpoint.open_eagle(tmp_path / "head"), 16)
    assert reason is not None and reason.startswith("draft model head: heads of 32")
    write_tiny_checkpoint(tmp_path / "other", config=hopper_config())
    other = load_cuda_weights(Checkpoint.open(tmp_path / "other"), CPU, num_threads=3)
    with pytest.raises(CheckpointError, match="does not fit the model's"):
        load_cuda_draft(Checkpoint.open_eagle(tmp_path / "head"), other)


def test_pieces_of_any_size_make_the_same_tensor(variants: dict[str, Path]) -> None:
    checkpoint = Checkpoint.open(variants["bf16"])
    wanted = checkpoint.tensor("embedding.weight")
    for piece_bytes in (1, 999, 1 << 20):
        if piece_bytes == 1:
            stored = checkpoint.stored("norm.weight")
        else:
            stored = checkpoint.stored("embedding.weight")
        target = torch.empty(stored.shape, dtype=stored.dtype)
        with TensorReader(CPU, num_threads=4, piece_bytes=piece_bytes) as reader:
            reader.wait(reader.read_into(stored, target))
            assert reader.num_bytes == stored.num_bytes
        if piece_bytes > 1:
            assert torch.equal(target, wanted)
        else:
            assert torch.equal(target, checkpoint.tensor("norm.weight"))


def test_a_file_that_shrank_is_named(variants: dict[str, Path], tmp_path: Path) -> None:
    source = variants["bf16"]
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    checkpoint = Checkpoint.open(tmp_path)
    last = checkpoint.stored(max(checkpoint.names(), key=lambda n: checkpoint.stored(n).offset))
    os.truncate(last.path, last.offset + last.num_bytes // 2)
    with pytest.raises(CheckpointError, match="changed while being read"):
        load_cuda_weights(checkpoint, CPU)


def test_what_the_kernels_cannot_run_is_said(variants: dict[str, Path], tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "tiny", layers=1)
    mixed = Checkpoint.open(variants["mixed"])
    for kind in KINDS:
        for products in ("exact", "fast"):
            checkpoint = Checkpoint.open(variants[kind])
            assert reason_against(checkpoint, "fp8", 16, products=products) is None
    assert "KV cache is bf16" in (reason_against(mixed, "bf16", 16) or "")
    assert "multiple of 16" in (reason_against(mixed, "fp8", 24) or "")
    bare = Checkpoint.open(variants["compressed"])
    reason = reason_against(bare, "fp8", 16, fp8_activations="static")
    assert reason is not None and reason.startswith("decoder.0.attention.q is FP8 without an input")
    assert "heads of 32" in (reason_against(Checkpoint.open(tmp_path / "tiny"), "fp8", 16) or "")


@pytest.mark.parametrize("largest", [1.0, 1000.0, 16000.0, 17000.0, 1e6])
def test_activations_stay_inside_fp16(largest: float) -> None:
    divisor = f16_divisor(largest / (6.0 * 448.0))
    assert math.log2(divisor).is_integer() and divisor >= 1.0
    assert largest * 4.0 / divisor <= 65504.0 * 1.0001
    assert divisor == 1.0 or largest * 4.0 / (divisor / 2) > 65504.0


@pytest.mark.parametrize("kind", ["mixed", "fp8-head"])
@pytest.mark.parametrize("fp8_activations", ["auto", "static", "per-token"])
def test_fp8_linears_take_scales_as_they_are_told(
    kind: str, fp8_activations: Fp8Activations, variants: dict[str, Path]
) -> None:
    checkpoint = Checkpoint.open(variants[kind])
    weights = load_cuda_weights(checkpoint, CPU, num_threads=2, fp8_activations=fp8_activations)
    found = [linear for linear in weights.linears if linear.weight.format == "fp8"]
    assert len(found) == (22 if kind == "mixed" else 1)
    for linear in found:
        if fp8_activations == "per-token":
            assert linear.input_scale is None and linear.sums_scale == 1.0
            assert linear.activation_kind == "e4m3_token"
        else:
            assert linear.input_scale is not None and linear.activation_kind == "e4m3"
