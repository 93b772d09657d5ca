"""Models that share this decoder, against transformers, on small random weights of their form.

Positions run across the end of the original context and up to the model's last; pictures go
through the tower where there is one. Two models in every run, all of them among the slow tests.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers import logging as transformers_logging

import tolerances
from bounded import relative
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.model.attention import DenseAttend
from halfbyte.model.decoder import Step
from halfbyte.model.load import load_decoder, load_vision
from sisters import SISTERS, Sister, always

LENGTH = 48


@pytest.fixture(autouse=True)
def _quiet() -> None:
    # It says of each model without a word about ties that it stores both tables.
    transformers_logging.set_verbosity_error()


def oracle(directory: Path, sister: Sister, dtype: torch.dtype) -> Any:
    text_only = sister.config.vision is None
    load: Any = AutoModelForCausalLM if text_only else AutoModelForImageTextToText
    return load.from_pretrained(directory, dtype=dtype).eval()


def starts(checkpoint: Checkpoint) -> list[int]:
    """Where a text begins: at 0, across the end of the original context, beyond it, at the end."""
    text = checkpoint.config.text
    original = text.rope.original_max_positions or text.max_positions // 4
    return [0, original - LENGTH // 2, 2 * original, text.max_positions - LENGTH]


@torch.no_grad()
def compare_text(checkpoint: Checkpoint, exact_model: Any, plain_model: Any) -> None:
    ids = torch.randint(20, checkpoint.config.text.vocab_size, (LENGTH,))
    decoder = load_decoder(checkpoint)
    for start in starts(checkpoint):
        positions = torch.arange(start, start + LENGTH)
        exact, plain = (
            model(ids[None], position_ids=positions[None], use_cache=False).logits[0]
            for model in (exact_model, plain_model)
        )
        ours = decoder(Step(ids, positions, DenseAttend([0, LENGTH])))
        assert relative(ours, exact) <= tolerances.TIMES_PLAIN * relative(plain, exact), start


@torch.no_grad()
def compare_pictures(checkpoint: Checkpoint, exact_model: Any, plain_model: Any) -> None:
    """Logits of a text with two pictures in it, of more than one merged patch each."""
    config = checkpoint.config.vision
    vision = load_vision(checkpoint)
    assert config is not None and vision is not None
    side = config.patch_size * config.spatial_merge_size
    sizes = [(2 * side, 3 * side), (3 * side, 5 * side)]
    images = [torch.randn(3, *size) for size in sizes]
    ids: list[int] = [1, 3]
    for height, width in sizes:
        row = [*[config.image_token_id] * (width // side), 12]
        ids += [*(row * (height // side))[:-1], 13, 77]
    token_ids = torch.tensor(ids)

    def theirs(model: Any) -> Tensor:
        padded = torch.zeros(2, 3, 3 * side, 5 * side, dtype=model.dtype)
        for index, (height, width) in enumerate(sizes):
            padded[index, :, :height, :width] = images[index]
        logits: Tensor = model(
            input_ids=token_ids[None], pixel_values=padded, image_sizes=torch.tensor(sizes)
        ).logits[0]
        return logits

    rows = (token_ids == config.image_token_id).nonzero().flatten()
    step = Step(
        token_ids,
        torch.arange(len(ids)),
        DenseAttend([0, len(ids)]),
        image_rows_I=rows,
        image_vectors_ID=torch.cat(vision(images)),
    )
    exact = theirs(exact_model)
    bound = tolerances.TIMES_PLAIN * relative(theirs(plain_model), exact)
    assert relative(load_decoder(checkpoint)(step), exact) <= bound


@pytest.mark.parametrize("sister", always(SISTERS, "ministral-3-3b", "pixtral-large-124b-llava"))
def test_logits_are_as_exact_as_transformers(sister: Sister, tmp_path: Path) -> None:
    sister.write(tmp_path / "m", layers=2, quantized=False)
    checkpoint = Checkpoint.open(tmp_path / "m")
    reference = tmp_path / ("m-hub" if sister.is_native else "m")
    models = [oracle(reference, sister, dtype) for dtype in (torch.float64, torch.bfloat16)]
    compare_text(checkpoint, *models)
    if checkpoint.config.vision is not None:
        compare_pictures(checkpoint, *models)


@pytest.mark.parametrize("sister", SISTERS, ids=str)
def test_a_small_model_is_of_the_published_form(sister: Sister) -> None:
    """Shrinking changes sizes only; what decides numerics is that of the real model."""
    real, small = sister.config, sister.read(sister.small(layers=3))
    assert small.text.rope == real.text.rope
    assert small.text.head_dim == real.text.head_dim == 128
    assert small.text.max_positions == real.text.max_positions
    assert small.text.tied_head == real.text.tied_head
    of_group = small.text.num_heads // small.text.num_kv_heads
    assert of_group == real.text.num_heads // real.text.num_kv_heads
    # Queries are as wide as the residual stream in the largest only.
    assert small.text.num_heads * 128 != small.text.width
    assert (small.vision is None) == (real.vision is None)
    if small.vision is not None and real.vision is not None:
        for field in ("head_dim", "patch_size", "spatial_merge_size", "has_merger", "activation"):
            assert getattr(small.vision, field) == getattr(real.vision, field)
