"""The vision part against transformers on random weights at odd sizes, and golden logits."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Mistral3ForConditionalGeneration

import tolerances
from bounded import relative
from golden_models import MODELS
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.config import ModelConfig
from halfbyte.errors import FormatError
from halfbyte.model.attention import DenseAttend
from halfbyte.model.decoder import Decoder, Step
from halfbyte.model.linear import Mode
from halfbyte.model.load import load_decoder, load_vision
from halfbyte.model.tiny import tiny_config, write_tiny_checkpoint
from halfbyte.model.vision import VisionModel, merge_patches, patch_rotation

IMAGE = 10
# Pixels (height, width): smallest that transformers takes (it fails on one merged patch), a wide
# strip, a tall one, beyond the trained size.
SIZES = ((56, 28), (28, 196), (140, 56), (308, 280))


def config_with(**changes: Any) -> ModelConfig:
    tiny = tiny_config(layers=2, vision=True)
    assert tiny.vision is not None
    return replace(tiny, vision=replace(tiny.vision, **changes))


def write(directory: Path, **changes: Any) -> Checkpoint:
    write_tiny_checkpoint(directory, config=config_with(**changes))
    return Checkpoint.open(directory)


def ours(checkpoint: Checkpoint, dtype: torch.dtype = torch.bfloat16) -> VisionModel:
    vision = load_vision(checkpoint, dtype=dtype)
    assert vision is not None
    return vision


def pictures(*sizes: tuple[int, int]) -> list[Tensor]:
    return [torch.randn(3, height, width) for height, width in sizes]


@torch.no_grad()
def theirs(directory: Path, dtype: torch.dtype, images: list[Tensor]) -> list[Tensor]:
    """transformers' vectors, each image in a call of its own."""
    model: Any = Mistral3ForConditionalGeneration.from_pretrained(directory, dtype=dtype).eval()
    return [
        model.get_image_features(
            image[None].to(dtype), torch.tensor([image.shape[1:]]), return_dict=True
        ).pooler_output[0]
        for image in images
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation": "gelu", "projector_activation": "silu"},
        {"projector_bias": True},
        {"feature_layer": -2},
        {"feature_layer": 1},
        {"head_dim": 24, "num_heads": 4, "width": 96},
    ],
    ids=str,
)
def test_vectors_are_as_exact_as_transformers(directory: Path, changes: dict[str, Any]) -> None:
    checkpoint = write(directory, **changes)
    images = pictures(*SIZES)
    exact = theirs(directory, torch.float64, images)
    plain = theirs(directory, torch.bfloat16, images)
    results = ours(checkpoint)(images)
    assert [tuple(result.shape) for result in results] == [(n, 128) for n in (2, 7, 10, 110)]
    bound = tolerances.TIMES_PLAIN * relative(torch.cat(plain), torch.cat(exact))
    assert relative(torch.cat(results), torch.cat(exact)) <= bound


@pytest.mark.parametrize(
    "size",
    [(1540, 84), (28, 1540), pytest.param((1540, 1540), marks=pytest.mark.slow)],
    ids=str,
)
def test_largest_image(directory: Path, size: tuple[int, int]) -> None:
    """1540 pixels a side are 55 merged patches; checked in f32 against f32.

    The whole square has 12,100 patches that all see each other: 2.5 GB in transformers, hence slow.
    """
    checkpoint = write(directory, num_layers=1)
    images = pictures(size)
    result = ours(checkpoint, torch.float32)(images)[0]
    assert result.shape == (size[0] // 28 * (size[1] // 28), 128)
    expected = theirs(directory, torch.float32, images)[0]
    # Their f32 angles are off by 2**-24 x 110 radians; ours are not.
    assert relative(result, expected) <= tolerances.GOLDEN_FP32


def test_an_image_does_not_depend_on_the_others(directory: Path) -> None:
    vision = ours(write(directory))
    images = pictures(*SIZES)
    together = vision(images)
    for image, result in zip(images, together, strict=True):
        assert torch.equal(vision([image])[0], result)


@pytest.mark.parametrize("size", [(28, 28), (42, 70), (28, 1540), (168, 196), (308, 280)])
@pytest.mark.parametrize("seed", [0, 1])
def test_slices_change_no_bit(directory: Path, size: tuple[int, int], seed: int) -> None:
    """Any number of units of a part at a time, others' work between them."""
    vision = ours(write(directory))
    image, other = pictures(size, (308, 280))
    random = Random(seed)
    bounds: list[tuple[int, int]] = []

    def rows(top: int, stop: int) -> Tensor:
        bounds.append((top, stop))
        return image[:, top:stop]

    with torch.inference_mode():
        encoding = vision.begin(*size, rows)
        between = iter(vision.begin(308, 280, lambda top, stop: other[:, top:stop]).parts())
        for part in encoding.parts():
            assert part.num_units >= 1
            start = 0
            while start < part.num_units:
                stop = random.randint(start + 1, part.num_units)
                part.compute(start, stop)
                start = stop
            one = next(between, None)
            if one is not None:
                one.compute(0, one.num_units)
    assert torch.equal(encoding.vectors_MD, vision([image])[0])
    # Each row of pixels is read once, so that few are floats at a time.
    tops, stops = zip(*bounds, strict=True)
    assert list(tops) == [0, *stops[:-1]] and stops[-1] == size[0] // 14 * 14


def prompt_of(images: list[Tensor]) -> list[int]:
    """Text around every image's rows of tokens, as the chat format lays them out."""
    ids = [1, 5]
    for number, image in enumerate(images):
        rows, columns = image.shape[1] // 28, image.shape[2] // 28
        ids += [*([*[IMAGE] * columns, 12] * rows)[:-1], 13, 77 + number]
    return [*ids, 6]


@pytest.mark.parametrize(
    "sizes",
    [
        ((56, 84), (84, 28)),
        ((28, 1540), (1540, 28), (56, 28)),
        ((252, 140), (28, 56), (84, 84), (140, 308), (56, 28)),
    ],
    ids=["two", "strips of 1540 pixels", "five"],
)
def test_logits_of_text_and_images_are_as_exact_as_transformers(
    directory: Path, sizes: tuple[tuple[int, int], ...]
) -> None:
    """Images of different shapes in one prompt, vectors scattered among the embeddings."""
    checkpoint = write(directory)
    images = pictures(*sizes)
    ids = prompt_of(images)

    @torch.no_grad()
    def reference(dtype: torch.dtype) -> Tensor:
        model: Any = Mistral3ForConditionalGeneration.from_pretrained(directory, dtype=dtype)
        height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
        padded = torch.zeros(len(images), 3, height, width, dtype=dtype)
        for index, image in enumerate(images):
            padded[index, :, : image.shape[1], : image.shape[2]] = image
        logits: Tensor = model.eval()(
            input_ids=torch.tensor([ids]), pixel_values=padded, image_sizes=torch.tensor(sizes)
        ).logits[0]
        return logits

    vectors = torch.cat(ours(checkpoint)(images))
    result = with_images(load_decoder(checkpoint), ids, vectors)
    exact = reference(torch.float64)
    bound = tolerances.TIMES_PLAIN * relative(reference(torch.bfloat16), exact)
    assert relative(result, exact) <= bound


def with_images(
    decoder: Decoder, ids: list[int], vectors: Tensor, stored_kv: bool = False
) -> Tensor:
    token_ids = torch.tensor(ids)
    attend = DenseAttend([0, len(ids)], decoder.kv_scales if stored_kv else None)
    rows = (token_ids == IMAGE).nonzero().flatten()
    assert len(rows) == len(vectors)
    logits: Tensor = decoder(Step(token_ids, torch.arange(len(ids)), attend, None, rows, vectors))
    return logits


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("part", "kind", "mode", "dtype", "bound"),
    [
        ("source", "source_fp32", "weight_only", torch.float32, tolerances.GOLDEN_FP32),
        ("export", "dequant_fp32", "weight_only", torch.float32, tolerances.GOLDEN_FP32),
        ("export", "dequant_bf16", "weight_only", torch.bfloat16, tolerances.GOLDEN_BF16),
        ("export", "qdq_bf16", "declared", torch.bfloat16, tolerances.GOLDEN_ROUNDED),
    ],
)
def test_golden_image_logits(
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
    checkpoint = Checkpoint.open(folder / part)
    vectors = ours(checkpoint, dtype)([golden["image_pixel_values"][0]])[0]
    decoder = load_decoder(checkpoint, mode=mode, dtype=dtype)
    ids = golden["image_input_ids"][0].tolist()
    result = with_images(decoder, ids, vectors, stored_kv=mode == "declared")
    assert relative(result, golden[f"logits.{kind}.image"][0]) <= bound


def test_a_single_merged_patch(directory: Path) -> None:
    """It sees nothing else, so it equals the same square seen through a one-patch window."""
    vision = ours(write(directory))
    image = pictures((28, 28))[0]
    assert vision([image])[0].shape == (1, 128)
    beyond = torch.nn.functional.pad(image, (0, 13, 0, 5))  # less than a patch: not seen
    assert torch.equal(vision([beyond])[0], vision([image])[0])


def test_text_only_models_have_none(directory: Path) -> None:
    write_tiny_checkpoint(directory, layers=1)
    assert load_vision(Checkpoint.open(directory)) is None


def test_image_smaller_than_a_merged_patch_is_refused(directory: Path) -> None:
    vision = ours(write(directory))
    with pytest.raises(FormatError, match="3 x 27 x 280 has no whole patch"):
        vision(pictures((27, 280)))
    with pytest.raises(FormatError, match="1 x 28 x 28"):
        vision([torch.randn(1, 28, 28)])


def test_merged_channels_come_square_by_square() -> None:
    patches = torch.tensor([[10 * patch + channel for channel in range(2)] for patch in range(9)])
    # The last row and column of a 3 x 3 grid are dropped: squares of patches 0 1 3 4.
    assert merge_patches(patches, 3, 3, 2).tolist() == [[0, 10, 30, 40, 1, 11, 31, 41]]


def test_rows_turn_even_frequencies() -> None:
    vision = config_with(head_dim=8, num_heads=8).vision
    assert vision is not None
    rotation = patch_rotation(vision, 2, 3, torch.device("cpu"))
    frequency = [10000.0 ** (-pair / 4) for pair in range(4)]
    expected = torch.tensor(
        [1 * frequency[0], 1 * frequency[2], 2 * frequency[1], 2 * frequency[3]]
    )
    assert torch.allclose(rotation.cos_TH2[5], expected.cos(), rtol=0, atol=tolerances.ANGLE)
    assert torch.allclose(rotation.sin_TH2[5], expected.sin(), rtol=0, atol=tolerances.ANGLE)
