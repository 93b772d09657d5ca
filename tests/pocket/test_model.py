"""The training model against transformers and against the engine's decoder, on random weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pocket.encode import Encoded, Encoder
from pocket.export import input_maxima, pixels_of, step_of, write_bf16
from pocket.mixture import item
from pocket.model import Inputs, Model, attend_one_by_one, initial_weights, pocket_config
from pocket.packs import Shape, held_out_batches
from pocket.train import to_device
from pocket.vocabulary import Vocabulary
from torch import Tensor
from transformers import Mistral3ForConditionalGeneration

import tolerances
from bounded import relative
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.model.load import load_decoder, load_vision

SMALL: dict[str, int] = {
    "layers": 2, "width": 128, "mlp_width": 128, "vision_layers": 2, "vision_width": 128,
}  # fmt: skip
SHAPE = Shape(2048, 40, 1024, 2048, 30)


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, tekken: Path
) -> tuple[dict[str, Tensor], Path]:
    """Weights that are exact in bf16, and their checkpoint."""
    weights = initial_weights(pocket_config(**SMALL), 3, "cpu")
    weights = {name: w.to(torch.bfloat16).float() for name, w in weights.items()}
    directory = tmp_path_factory.mktemp("checkpoint") / "bf16"
    write_bf16(weights, pocket_config(**SMALL), tekken, directory)
    return weights, directory


def flat_logits(weights: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
    model = Model(
        pocket_config(**SMALL), "cpu", attend=attend_one_by_one, dtype=torch.float32, compiled=False
    )
    return model.logits(weights, model.hidden(weights, inputs)).detach()


@torch.no_grad()
def independent(directory: Path, encoded: Encoded) -> Tensor:
    model: Any = Mistral3ForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    arguments: dict[str, Any] = {"input_ids": torch.tensor([encoded.ids])}
    if encoded.images:
        # One image a conversation here, so that nothing has to be padded.
        pixels = pixels_of(encoded.images[0])
        arguments["pixel_values"] = pixels[None]
        arguments["image_sizes"] = torch.tensor([pixels.shape[1:]])
    logits: Tensor = model.eval()(**arguments).logits[0]
    return logits


@pytest.mark.parametrize("kind", ["images", "integers", "recall"])
def test_packed_logits_equal_transformers(
    kind: str, trained: tuple[dict[str, Tensor], Path], vocabulary: Vocabulary
) -> None:
    """Several documents in one batch; each as transformers computes it alone."""
    weights, directory = trained
    encoder = Encoder(vocabulary)
    numbers = [n for n in range(12) if len(encoder.encode(item(kind, n, "test")).images) < 2]
    numbers = numbers[: 2 if kind == "recall" else 4]
    batch = next(iter(held_out_batches(kind, numbers, encoder, vocabulary.control, short=SHAPE)))
    logits = flat_logits(weights, to_device(batch, "cpu")[0])
    bounds = batch.token_bounds.tolist()
    assert len(batch.kinds) >= 1
    kept = [n for n in numbers if len(encoder.encode(item(kind, n, "test")).ids) <= 1024]
    for index, number in enumerate(kept[: len(batch.kinds)]):
        encoded = encoder.encode(item(kind, number, "test"))
        found = logits[bounds[index] : bounds[index + 1]]
        if encoded.images and encoded.images[0].patches_PC.shape[0] == 4:
            continue  # transformers fails on a single merged patch
        assert relative(found, independent(directory, encoded)) <= tolerances.GOLDEN_FP32


def test_the_engine_computes_what_was_trained(
    trained: tuple[dict[str, Tensor], Path], vocabulary: Vocabulary
) -> None:
    weights, directory = trained
    encoder = Encoder(vocabulary)
    checkpoint = Checkpoint.open(directory)
    decoder = load_decoder(checkpoint, dtype=torch.float32)
    vision = load_vision(checkpoint, dtype=torch.float32)
    for number in range(4):
        encoded = encoder.encode(item("images", number, "test"))
        batch = next(
            iter(held_out_batches("images", [number], encoder, vocabulary.control, short=SHAPE))
        )
        ours = flat_logits(weights, to_device(batch, "cpu")[0])[: len(encoded.ids)]
        assert relative(decoder(step_of(encoded, vision)[0]), ours) <= tolerances.GOLDEN_FP32


def test_calibration_sees_text_and_images(
    trained: tuple[dict[str, Tensor], Path], vocabulary: Vocabulary
) -> None:
    """Maxima over both are the larger ones of each."""
    checkpoint = Checkpoint.open(trained[1])
    encoder = Encoder(vocabulary)
    text, image = (encoder.encode(item(kind, 0, "train")) for kind in ("integers", "look"))
    both = input_maxima(checkpoint, [text, image])
    for name, largest in both.items():
        alone = [input_maxima_of(checkpoint, encoded)[name] for encoded in (text, image)]
        assert largest == torch.maximum(*alone) and largest > 0
        break


def input_maxima_of(checkpoint: Checkpoint, encoded: Encoded) -> dict[str, Tensor]:
    return input_maxima(checkpoint, [encoded])
