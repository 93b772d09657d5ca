"""Random small models against transformers: the decoder, the engine in chunks, the vision part.

Each seed draws a class (Ministral3, Mistral, Mistral3), depth, widths, heads, rotary settings, a
tower, prompts and pictures, saves transformers' own random model and computes it three ways there:
float64 is the truth, bfloat16 and float32 say how far plain arithmetic comes. Bounds are those of
the tests with fixed models.
"""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Ministral3Config,
    Ministral3ForCausalLM,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    PixtralVisionConfig,
)

import tolerances
from bounded import relative
from engine_driver import load
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.model.attention import DenseAttend
from halfbyte.model.decoder import Step
from halfbyte.model.load import load_decoder, load_vision

IMAGE_TOKEN = 10


def text_fields(rng: random.Random, kind: str) -> dict[str, Any]:
    """A text model that fits a test: every size its own, none a round number by nature."""
    head_dim = rng.choice([16, 32, 48, 64, 80, 128])
    kv_heads = rng.choice([1, 1, 2, 3])
    heads = kv_heads * rng.choice([1, 2, 3, 6])
    positions = rng.choice([8, 16, 64, 128])
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": rng.choice([1e4, 1e5, 1e6, 1e8])}
    if kind == "ministral3":
        # The library's class needs both, whatever the type of rope.
        rope["llama_4_scaling_beta"] = rng.choice([0.0, 0.1, 0.35])
        rope["original_max_position_embeddings"] = positions
    if rng.random() < 0.6:
        mscale, all_dim = rng.choice([(1.0, 0.0), (1.0, 1.0), (0.7, 0.5)])
        rope |= {
            "rope_type": "yarn",
            "factor": rng.choice([1.0, 2.5, 16.0, 64.0]),
            "original_max_position_embeddings": positions,
            "beta_fast": rng.choice([32.0, 4.0]),
            "beta_slow": 1.0,
            "mscale": mscale,
            "mscale_all_dim": all_dim,
        }
    return {
        "vocab_size": rng.randrange(97, 1024),
        "hidden_size": 8 * rng.randrange(4, 24),
        "intermediate_size": 8 * rng.randrange(6, 40) + rng.choice([0, 1, 4]),
        "num_hidden_layers": rng.randrange(1, 5),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": rng.choice([1e-5, 1e-6]),
        "max_position_embeddings": 4096,
        "rope_parameters": rope,
        "sliding_window": None,
        "tie_word_embeddings": rng.random() < 0.3,
        "dtype": "bfloat16",
    }


def vision_fields(rng: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
    """A tower, and what the model says of its use."""
    heads, head_dim = rng.choice([1, 2, 4]), rng.choice([8, 16, 24, 32])
    layers = rng.randrange(1, 4)
    tower = {
        "hidden_size": heads * head_dim,
        "intermediate_size": rng.randrange(20, 120),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "head_dim": head_dim,
        "patch_size": (patch := rng.choice([8, 14, 16])),
        "image_size": patch * 24,
        "num_channels": 3,
        "hidden_act": rng.choice(["silu", "gelu"]),
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    use = {
        "spatial_merge_size": rng.choice([1, 2, 3]),
        "projector_hidden_act": rng.choice(["silu", "gelu"]),
        "multimodal_projector_bias": rng.random() < 0.5,
        # 0 would mean the patches themselves, of which the library keeps no state.
        "vision_feature_layer": rng.choice([-1, -1, 1, -2] if layers > 1 else [-1]),
    }
    return tower, use


@torch.no_grad()
def write_model(directory: Path, rng: random.Random) -> str:
    """Save a random model of a random class; returns its kind."""
    kind = rng.choice(["ministral3", "ministral3", "mistral", "mistral3"])
    model: Any
    if kind == "mistral":
        model = MistralForCausalLM(MistralConfig(**text_fields(rng, kind)))
    elif kind == "ministral3":
        model = Ministral3ForCausalLM(Ministral3Config(**text_fields(rng, kind)))
    else:
        tower, use = vision_fields(rng)
        fields = text_fields(rng, "ministral3")
        tied = fields["tie_word_embeddings"]
        config = Mistral3Config(
            text_config=Ministral3Config(**fields),
            vision_config=PixtralVisionConfig(**tower),
            image_token_index=IMAGE_TOKEN,
            tie_word_embeddings=tied,
            dtype="bfloat16",
            **use,
        )
        model = Mistral3ForConditionalGeneration(config)
    spread = rng.choice([0.8, 1.2, 1.5])
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            mean = 0.0 if name.endswith("bias") else 1.0
            parameter.copy_(mean + 0.1 * torch.randn(parameter.shape))
        else:
            inputs = parameter[0].numel() if "embed_tokens" not in name else 1
            parameter.copy_(torch.randn(parameter.shape) * spread / inputs**0.5)
    model.bfloat16().save_pretrained(directory)
    return kind


@torch.no_grad()
def logits_of(directory: Path, kind: str, dtype: torch.dtype, ids: Tensor) -> Tensor:
    load_class: Any = (
        Mistral3ForConditionalGeneration if kind == "mistral3" else AutoModelForCausalLM
    )
    model = load_class.from_pretrained(directory, dtype=dtype).eval()
    logits: Tensor = model(ids[None], use_cache=False).logits[0]
    return logits


def compare_text(directory: Path, kind: str, rng: random.Random) -> None:
    checkpoint = Checkpoint.open(directory)
    length = rng.choice([1, 2, 17, 90, 300, rng.randrange(1, 700)])
    ids = torch.randint(IMAGE_TOKEN + 1, checkpoint.config.text.vocab_size, (length,))
    exact, plain, narrow = (
        logits_of(directory, kind, dtype, ids)
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
    )
    step = Step(ids, torch.arange(length), DenseAttend([0, length]))
    ours = load_decoder(checkpoint, dtype=torch.float32)(step)
    # Over long texts even plain f32 is further off than the bound for short ones.
    bound = max(tolerances.GOLDEN_FP32, tolerances.TIMES_PLAIN * relative(plain, exact))
    assert relative(ours, exact) <= bound
    bound = tolerances.TIMES_PLAIN * relative(narrow, exact)
    block = rng.choice([1, 5, 16, 32])
    engine = load(
        directory,
        max_model_len=768,
        kv_cache_tokens=768 + block,
        kv_cache="bf16",
        block_tokens=block,
    )
    chunk = rng.choice([1, 7, 64, 512]) if length < 100 else rng.choice([33, 100, 512])
    scored = torch.cat([part.clone() for part in engine.score(ids.tolist(), chunk)])
    assert relative(scored, exact) <= bound


@torch.no_grad()
def compare_vision(directory: Path, rng: random.Random) -> None:
    checkpoint = Checkpoint.open(directory)
    config = checkpoint.config.vision
    assert config is not None
    side = config.patch_size * config.spatial_merge_size
    # One merged patch alone is more than the library can hold.
    sizes = [(rng.randrange(1, 6), rng.randrange(2, 7)) for _ in range(rng.randrange(1, 4))]
    images = [torch.randn(3, side * height, side * width) for height, width in sizes]
    exact, plain = (
        torch.cat(vectors(directory, dtype, images)) for dtype in (torch.float64, torch.bfloat16)
    )
    vision = load_vision(checkpoint)
    assert vision is not None
    ours = vision(images)
    assert [len(part) for part in ours] == [height * width for height, width in sizes]
    assert relative(torch.cat(ours), exact) <= tolerances.TIMES_PLAIN * relative(plain, exact)


@torch.no_grad()
def vectors(directory: Path, dtype: torch.dtype, images: list[Tensor]) -> list[Tensor]:
    """transformers' vectors, each image in a call of its own."""
    model: Any = Mistral3ForConditionalGeneration.from_pretrained(directory, dtype=dtype).eval()
    return [
        model.get_image_features(
            image[None].to(dtype), torch.tensor([image.shape[1:]]), return_dict=True
        ).pooler_output[0]
        for image in images
    ]


def compare(seed: int, directory: Path) -> str:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    kind = write_model(directory, rng)
    compare_text(directory, kind, rng)
    if kind == "mistral3":
        compare_vision(directory, rng)
    return kind


# One with a tower, two of Ministral3, one of Mistral.
@pytest.mark.parametrize("seed", [0, 1, 2, 5])
def test_a_random_model_is_computed_as_exactly_as_transformers(seed: int, tmp_path: Path) -> None:
    compare(seed, tmp_path / "model")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_random_models_are_computed_as_exactly_as_transformers(tmp_path: Path) -> None:
    kinds = []
    for seed in range(100, 170):
        try:
            kinds.append(compare(seed, tmp_path / str(seed)))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}") from error
    assert set(kinds) == {"ministral3", "mistral", "mistral3"}
