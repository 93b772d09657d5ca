import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine_driver import (
    GREEDY,
    Answer,
    Mixed,
    assert_equal,
    load,
    needs_exact_kernels,
    prompt_of,
    request,
    run,
    run_alone,
    speculating,
)
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.engine import images as engine_images
from halfbyte.engine.images import ImageEncoder
from halfbyte.engine.plan.sequence import Sequence as EngineSequence
from halfbyte.engine.request import ImageInput
from halfbyte.errors import RequestError
from halfbyte.model.load import load_vision
from halfbyte.model.tiny import write_tiny_checkpoint
from tolerances import SAME_LOGPROB

IMAGE, BREAK, END = 10, 12, 13
SIDE = 28  # pixels of a merged patch
TEXT = [token for token in prompt_of(40, 5) if token not in (IMAGE, BREAK, END)]


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("seeing") / "bf16"
    write_tiny_checkpoint(directory, layers=2, vision=True)
    return directory


def picture(columns: int, rows: int, seed: int, offset: int) -> ImageInput:
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (3, rows * SIDE, columns * SIDE), dtype=np.uint8)
    return ImageInput.of(pixels, offset, rows * (columns + 1))


def tokens(columns: int, rows: int) -> list[int]:
    ids = ([IMAGE] * columns + [BREAK]) * rows
    return [*ids[:-1], END]


def two_pictures(seed: int) -> tuple[list[int], tuple[ImageInput, ...]]:
    """Text, a picture of 3 x 2 patches, text, one of 2 x 4, text."""
    prompt = [*TEXT[:9], *tokens(3, 2), *TEXT[9:14], *tokens(2, 4), *TEXT[14:20]]
    return prompt, (picture(3, 2, seed, 9), picture(2, 4, seed + 1, 9 + 8 + 5))


def assert_close(found: Answer, wanted: Answer) -> None:
    assert found.token_ids[0] == wanted.token_ids[0]
    for ours, theirs in zip(found.logprobs, wanted.logprobs, strict=True):
        if ours.token_id != theirs.token_id:
            assert theirs.top[0][1] - theirs.top[1][1] <= SAME_LOGPROB
            return
        assert ours.logprob == pytest.approx(theirs.logprob, abs=SAME_LOGPROB)


@pytest.mark.parametrize(
    "options",
    [
        {"max_batch_tokens": 5, "max_sequences": 5},
        {"max_batch_tokens": 16, "max_sequences": 5},
        {"block_tokens": 4},
        {"prefix_cache": False},
    ],
)
def test_images_do_not_depend_on_chunks_cache_or_company(
    seeing: Path, options: dict[str, Any]
) -> None:
    prompt, pictures = two_pictures(0)
    wanted = run_alone(load(seeing, prefix_cache=False), prompt, images=pictures)
    engine = load(seeing, **options)
    answers = run(
        engine,
        [
            request("text", TEXT),
            request("seen", prompt, images=pictures),
            request("other", prompt, images=two_pictures(7)[1]),
            request("again", prompt, images=pictures),
        ],
    )
    assert_close(answers["seen"], wanted)
    assert_close(answers["again"], wanted)
    assert_close(run_alone(engine, prompt, images=pictures), wanted)
    assert_close(answers["text"], run_alone(load(seeing), TEXT))


def test_other_pixels_give_another_answer_and_share_no_block(seeing: Path) -> None:
    engine = load(seeing, block_tokens=4)
    prompt, pictures = two_pictures(0)
    params = replace(GREEDY, logprobs=0)
    first = run_alone(engine, prompt, params, images=pictures)
    other = run_alone(engine, prompt, params, images=two_pictures(7)[1])
    again = run_alone(engine, prompt, params, images=pictures)
    assert first.finish and other.finish and again.finish
    # Only the two blocks before the first picture are the same.
    assert other.finish.cached_tokens == 8
    assert again.finish.cached_tokens == len(prompt) // 4 * 4 - (4 if len(prompt) % 4 == 0 else 0)
    assert [item.logprob for item in first.logprobs] != [item.logprob for item in other.logprobs]


def test_second_picture_alone_may_differ(seeing: Path) -> None:
    engine = load(seeing, block_tokens=4)
    prompt, (one, two) = two_pictures(0)
    run_alone(engine, prompt, images=(one, two))
    changed = picture(2, 4, 99, two.offset)
    answer = run_alone(engine, prompt, images=(one, changed))
    assert answer.finish is not None
    assert answer.finish.cached_tokens == two.offset // 4 * 4
    assert_close(answer, run_alone(load(seeing), prompt, images=(one, changed)))


def test_image_is_encoded_once(seeing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load(seeing, max_batch_tokens=8, max_sequences=4, prefix_cache=False)
    prompt, pictures = two_pictures(0)
    encoder = engine._runner.images
    assert encoder is not None
    encoded: list[tuple[int, int]] = []
    vision = encoder._vision
    begin = vision.begin

    def count(height: int, width: int, rows: Any) -> Any:
        encoded.append((height, width))
        return begin(height, width, rows)

    monkeypatch.setattr(vision, "begin", count)
    run(engine, [request(str(i), prompt, images=pictures) for i in range(4)])
    assert encoded == [(2 * SIDE, 3 * SIDE), (4 * SIDE, 2 * SIDE)]


def test_kept_vectors_are_bounded(seeing: Path) -> None:
    vision = load_vision(Checkpoint.open(seeing))
    assert vision is not None
    encoder = ImageEncoder(vision, kept_bytes=4000)
    pictures = [picture(3, 2, seed, 0) for seed in range(5)]
    for image in pictures:
        vectors = encoder.vectors_of(image, math.inf)
        assert vectors is not None
        assert encoder.num_bytes <= max(4000, vectors.nbytes)
    assert engine_images.KEPT_BYTES > 4000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offset": 60}, "claims tokens 60 to 68"),
        ({"offset": 10}, "has 6 patches; the prompt holds 5 image tokens"),
        ({"num_tokens": 3}, "the prompt holds 3 image tokens"),
    ],
)
def test_image_that_does_not_fit_its_tokens_is_refused(
    seeing: Path, change: dict[str, Any], message: str
) -> None:
    prompt = [*TEXT[:9], *tokens(3, 2), *TEXT[9:]]
    image = replace(picture(3, 2, 0, 9), **change)
    with pytest.raises(RequestError, match=message) as caught:
        load(seeing).add(request("a", prompt, images=(image,)))
    assert caught.value.code == "invalid_image"


def test_overlapping_images_are_refused(seeing: Path) -> None:
    prompt = [*TEXT[:9], *tokens(3, 2), *TEXT[9:]]
    image = picture(3, 2, 0, 9)
    with pytest.raises(RequestError, match=r"images\[1\] claims"):
        load(seeing).add(request("a", prompt, images=(image, image)))


def test_text_model_refuses_images(tiny: Path) -> None:
    prompt, pictures = two_pictures(0)
    with pytest.raises(RequestError, match="takes no images"):
        load(tiny).add(request("a", prompt, images=pictures))


def test_blocks_tell_where_their_picture_begins() -> None:
    """The same tokens and pixels one place further are another content."""
    pixels = picture(2, 2, 3, 0).pixels

    def digests(offset: int) -> list[bytes]:
        images = (ImageInput.of(pixels, offset, 6),)
        sequence = EngineSequence(
            request("one", [IMAGE] * 12, images=images), arrival=0, seed=0, max_tokens=1
        )
        sequence.extend_digests(4, 0, 3)
        return list(sequence.digests)

    at_0, at_1, at_4 = digests(0), digests(1), digests(4)
    assert len(at_0) == 3 and at_0 == digests(0)
    # Each block's digest is part of the next one's, so the first that differs decides.
    assert at_0[0] != at_1[0] and at_1[0] != at_4[0] and at_0[0] != at_4[0]


@needs_exact_kernels
def test_guesses_of_image_tokens_show_no_image(seeing: Path) -> None:
    """Guesses behind pictures are checked as they are elsewhere, image tokens among them."""
    prompt, pictures = two_pictures(0)
    params = replace(GREEDY, max_tokens=16)
    wanted = run_alone(load(seeing), prompt, params, images=pictures)

    class Spoilt(Mixed):
        def guess_one(self, sequence: EngineSequence, count: int) -> list[int]:
            right = super().guess_one(sequence, count)
            return [*right[:-1], IMAGE]

    engine = speculating(seeing, Spoilt({"alone": wanted.token_ids}))
    found = run_alone(engine, prompt, params, images=pictures)
    assert_equal(found, wanted)
    assert engine.stats().accepted_tokens > 0
