"""The decoder against transformers with the same weights, against golden logits, and itself."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Ministral3ForCausalLM

import tolerances
from bounded import relative
from golden_models import MODELS
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.config import RopeConfig
from halfbyte.kernels.dispatch import Rotation
from halfbyte.model.attention import DenseAttend
from halfbyte.model.decoder import Decoder, Step
from halfbyte.model.linear import Mode
from halfbyte.model.load import load_decoder, load_layer
from halfbyte.model.tiny import tiny_config, write_tiny_checkpoint

TAPS = ["attention.input", "attention.k", "attention.v", "attention.o.input", "mlp.input"]


def run(decoder: Decoder, ids_SJ: Tensor, *, stored_kv: bool = False) -> Tensor:
    """Logits of equally long sequences in one flat batch: (S, J, V)."""
    sequences, length = ids_SJ.shape
    bounds = [index * length for index in range(sequences + 1)]
    attend = DenseAttend(bounds, decoder.kv_scales if stored_kv else None)
    positions = torch.arange(length).repeat(sequences)
    logits: Tensor = decoder(Step(ids_SJ.flatten(), positions, attend))
    return logits.view(sequences, length, -1)


@torch.no_grad()
def independent(directory: Path, dtype: torch.dtype, ids_SJ: Tensor) -> Tensor:
    """Logits of transformers' class with the same files."""
    model: Any = Ministral3ForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    logits: Tensor = model(ids_SJ).logits
    return logits


@pytest.mark.parametrize("tied_head", [False, True])
def test_logits_are_as_exact_as_transformers(directory: Path, tied_head: bool) -> None:
    """YaRN, query scale (positions past the original 64), grouped heads, odd head_dim."""
    write_tiny_checkpoint(directory, layers=4, tied_head=tied_head)
    ids = torch.randint(0, 512, (2, 150))
    exact = independent(directory, torch.float64, ids)
    theirs = independent(directory, torch.bfloat16, ids)
    ours = run(load_decoder(Checkpoint.open(directory)), ids)
    assert relative(ours, exact) <= tolerances.TIMES_PLAIN * relative(theirs, exact)


def test_f32_logits_equal_transformers(directory: Path) -> None:
    write_tiny_checkpoint(directory, layers=4)
    ids = torch.randint(0, 512, (1, 100))
    theirs = independent(directory, torch.float32, ids)
    ours = run(load_decoder(Checkpoint.open(directory), dtype=torch.float32), ids)
    assert relative(ours, theirs) <= tolerances.GOLDEN_FP32


class Scaled(DenseAttend):
    """Dense attention whose queries are multiplied by one number first."""

    def __init__(self, length: int, factor: float) -> None:
        super().__init__([0, length])
        self._factor = factor

    def __call__(
        self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, rotation: Rotation
    ) -> Tensor:
        return super().__call__(layer, q_TNH * self._factor, k_TKH, v_TKH, rotation)


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("start", [0, 4096, 65536, 262144 - 4096])
def test_position_enters_only_as_distance_and_as_query_scale(
    directory: Path, start: int, beta: float
) -> None:
    """Medium 3.5's YaRN out to its last position: a text says there what it says at the start.

    With a slope, every query within one original context is scaled alike. f32 angles, as the
    library computes them, would be off by 0.016 rad at 256k.
    """
    yarn = RopeConfig(1e6, "yarn", 64.0, 4096, 4.0, 1.0, 1.0, 0.0, llama_4_scaling_beta=beta)
    tiny = tiny_config(layers=2)
    text = replace(tiny.text, rope=yarn, max_positions=262144, head_dim=128)
    write_tiny_checkpoint(directory, config=replace(tiny, text=text))
    decoder = load_decoder(Checkpoint.open(directory), dtype=torch.float32)
    ids, positions = torch.randint(0, 512, (60,)), torch.arange(60)
    scale = 1 + beta * math.log(1 + start // 4096)
    expected = decoder(Step(ids, positions, Scaled(60, scale)))
    found = decoder(Step(ids, start + positions, DenseAttend([0, 60])))
    assert relative(found, expected) <= tolerances.GOLDEN_FP32
    if start and beta:
        assert relative(found, decoder(Step(ids, positions, DenseAttend([0, 60])))) > 0.001


def test_a_plain_llama_geometry(directory: Path) -> None:
    """The demo model's kind: default rope, no query scale, width = heads x head_dim."""
    fields = {
        "architectures": ["Ministral3ForCausalLM"],
        "model_type": "ministral3",
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 128,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 100000.0,
            "llama_4_scaling_beta": 0.0,
            "original_max_position_embeddings": 512,
        },
    }
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(fields))
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(directory), dtype=torch.bfloat16
    )
    model.save_pretrained(directory)
    ids = torch.randint(0, 128, (1, 40))
    exact = independent(directory, torch.float64, ids)
    theirs = independent(directory, torch.bfloat16, ids)
    ours = run(load_decoder(Checkpoint.open(directory)), ids)
    assert relative(ours, exact) <= tolerances.TIMES_PLAIN * relative(theirs, exact)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("part", "kind", "mode", "dtype", "bound"),
    [
        ("source", "source_fp32", "weight_only", torch.float32, tolerances.GOLDEN_FP32),
        ("source", "source_bf16", "weight_only", torch.bfloat16, tolerances.GOLDEN_BF16),
        ("export", "dequant_fp32", "weight_only", torch.float32, tolerances.GOLDEN_FP32),
        ("export", "dequant_bf16", "weight_only", torch.bfloat16, tolerances.GOLDEN_BF16),
        ("export", "qdq_bf16", "declared", torch.bfloat16, tolerances.GOLDEN_ROUNDED),
        ("export", "fakequant_fused_bf16", "declared", torch.bfloat16, tolerances.GOLDEN_ROUNDED),
    ],
)
def test_golden_logits(
    golden_model: Callable[[str], Path],
    name: str,
    part: str,
    kind: str,
    mode: Mode,
    dtype: torch.dtype,
    bound: float,
) -> None:
    folder = golden_model(name)
    golden = load_file(folder / "golden-forward.safetensors")
    expected = golden[f"logits.{kind}.text"].float()
    decoder = load_decoder(Checkpoint.open(folder / part), mode=mode, dtype=dtype)
    logits = run(decoder, golden["eval_input_ids"], stored_kv=mode == "declared")
    assert relative(logits, expected) <= bound
    log_p, log_q = expected.log_softmax(-1), logits.log_softmax(-1)
    assert (log_p.exp() * (log_p - log_q)).sum(-1).mean() <= tolerances.GOLDEN_ROUNDED_KL


@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_final_norm_takes_the_epsilon_of_the_config(directory: Path, eps: float) -> None:
    """Residuals of real models dwarf it; one as small as it is shows which was taken."""
    config = tiny_config(layers=1)
    config = replace(config, text=replace(config.text, norm_eps=eps))
    write_tiny_checkpoint(directory, config=config)
    decoder = load_decoder(Checkpoint.open(directory))
    residual_TD = torch.randn(5, config.text.width).mul_(math.sqrt(eps)).to(torch.bfloat16)
    wide_TD = residual_TD.double()
    wanted_TD = wide_TD * (wide_TD.square().mean(-1, keepdim=True) + eps).rsqrt()
    _, found_TD = decoder.concluded(None, residual_TD, None)
    # A tenth or ten times of it moves every value by a third and more.
    assert (
        relative(found_TD.double(), wanted_TD * decoder.norm_D.double()) <= tolerances.GOLDEN_BF16
    )


def test_only_the_wanted_rows(directory: Path) -> None:
    write_tiny_checkpoint(directory, layers=2)
    decoder = load_decoder(Checkpoint.open(directory))
    ids, positions = torch.randint(0, 512, (9,)), torch.arange(9)
    attend = DenseAttend([0, 9])
    rows = torch.tensor([8, 3])
    everything = decoder(Step(ids, positions, attend))
    assert everything.dtype == torch.float32
    assert torch.equal(decoder(Step(ids, positions, attend, rows)), everything[rows])


def test_sequences_of_a_flat_batch_do_not_see_each_other(directory: Path) -> None:
    write_tiny_checkpoint(directory, layers=2)
    decoder = load_decoder(Checkpoint.open(directory))
    ids = torch.randint(0, 512, (12,))
    positions = torch.cat((torch.arange(5), torch.arange(7)))
    both = decoder(Step(ids, positions, DenseAttend([0, 5, 12])))
    first = decoder(Step(ids[:5], positions[:5], DenseAttend([0, 5])))
    second = decoder(Step(ids[5:], positions[5:], DenseAttend([0, 7])))
    assert torch.equal(both, torch.cat((first, second)))


def test_image_vectors_replace_embeddings(directory: Path) -> None:
    """Putting a token's own embedding in its place changes nothing; another vector does."""
    write_tiny_checkpoint(directory, layers=2)
    decoder = load_decoder(Checkpoint.open(directory))
    ids, positions, attend = torch.tensor([5, 10, 10, 7]), torch.arange(4), DenseAttend([0, 4])
    other = torch.tensor([5, 20, 30, 7])
    rows = torch.tensor([1, 2])
    vectors = decoder.embedding_VD[torch.tensor([20, 30])]
    expected = decoder(Step(other, positions, attend))
    replaced = decoder(Step(ids, positions, attend, None, rows, vectors))
    assert torch.equal(replaced, expected)
    assert not torch.equal(decoder(Step(ids, positions, attend)), expected)


def test_layers_one_by_one_are_the_decoder(directory: Path) -> None:
    """What calibration runs is what serving runs; taps see every input, in order."""
    config = write_tiny_checkpoint(directory, layers=3, dialect="mistral-fp8")
    checkpoint = Checkpoint.open(directory)
    decoder = load_decoder(checkpoint)
    ids, positions, attend = torch.randint(0, 512, (20,)), torch.arange(20), DenseAttend([0, 20])
    seen: dict[str, Tensor] = {}
    x_TD = decoder.embed(Step(ids, positions, attend))
    rotation = decoder.rotary.at(positions)
    for index in range(config.text.num_layers):
        before = x_TD.clone()
        layer = load_layer(checkpoint, index)
        tapped = layer(x_TD, index, attend, rotation, seen.__setitem__)
        assert torch.equal(layer(x_TD, index, attend, rotation), tapped)
        assert torch.equal(x_TD, before)
        x_TD = tapped
    assert list(seen) == [*TAPS, "mlp.down.input"]
    text = config.text
    assert seen["attention.k"].shape == (20, text.num_kv_heads, text.head_dim)
    assert seen["mlp.down.input"].shape == (20, text.mlp_width)
    logits = decoder.head(
        torch.nn.functional.rms_norm(
            x_TD.float(), x_TD.shape[-1:], decoder.norm_D.float(), text.norm_eps
        ).to(torch.bfloat16),
        torch.float32,
    )
    # Decoded weights are rounded to bf16 there, not here.
    assert relative(logits, decoder(Step(ids, positions, attend))) <= tolerances.GOLDEN_BF16


def test_two_models_in_one_process(directory: Path) -> None:
    write_tiny_checkpoint(directory / "a", layers=2, seed=1)
    write_tiny_checkpoint(directory / "b", layers=2, seed=2)
    ids = torch.randint(0, 512, (1, 10))
    alone = run(load_decoder(Checkpoint.open(directory / "a")), ids)
    one = load_decoder(Checkpoint.open(directory / "a"))
    two = load_decoder(Checkpoint.open(directory / "b"))
    assert not torch.equal(run(two, ids), alone)
    assert torch.equal(run(one, ids), alone)


def test_config_is_the_text_part() -> None:
    assert tiny_config(vision=True).text == tiny_config().text
