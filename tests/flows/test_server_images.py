"""Pictures from the wire to the answer: data URLs, the real encoder, chunks, prefixes, company."""

import asyncio
import base64
import io
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from PIL import Image

from engine_driver import GREEDY, run_alone
from flows.stand import END_THINK, THINK, Stand, ask, standing, write_model
from halfbyte.chat.tokens import load_chat
from halfbyte.cli.main import main
from halfbyte.engine.config import EngineConfig
from halfbyte.engine.core import Engine
from halfbyte.engine.request import ImageInput
from tolerances import SAME_LOGPROB

Part = str | Image.Image


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(2)
    path = tmp_path_factory.mktemp("models") / "seeing"
    write_model(path, vision=True)
    return path


@pytest.fixture
async def stand(directory: Path) -> AsyncIterator[Stand]:
    """Steps of 48 tokens, so that every picture here is cut."""
    async with standing(
        directory,
        max_model_len=1024,
        kv_cache_tokens=8192,
        max_sequences=8,
        max_batch_tokens=48,
    ) as stand:
        yield stand


def noise(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    values = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(values)


def data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def user(*parts: Part) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = []
    for part in parts:
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
        else:
            content.append({"type": "image_url", "image_url": {"url": data_url(part)}})
    return [{"role": "user", "content": content}]


# Odd sizes and both extremes of aspect; more than one merged patch wide, high, or neither.
PICTURES: dict[str, tuple[Part, ...]] = {
    "one": ("What is it?", noise(100, 61, 1)),
    "strip": (noise(1540, 9, 2), "and", noise(3, 700, 3), "?"),
    "three": ("a", noise(57, 28, 4), "b", noise(29, 85, 5), noise(28, 28, 6), "c"),
    "text": ("Only words, and more words than one chunk holds, so that they are cut as well.",),
}


async def answer(stand: Stand, parts: Sequence[Part], **options: Any) -> Any:
    return await ask(
        stand, messages=user(*parts), logprobs=True, top_logprobs=2, max_tokens=6, **options
    )


def alone(directory: Path, parts: Sequence[Part]) -> list[Any]:
    """The same conversation in an engine of its own, in one chunk, without a prefix cache."""
    chat = load_chat(directory)
    content: list[dict[str, Any]] = []
    for part in parts:
        kind = "text" if isinstance(part, str) else "image"
        content.append({"type": kind, kind: part})
    prompt = chat.encode([{"role": "user", "content": content}])
    images = tuple(ImageInput.of(i.pixels, i.offset, i.num_tokens) for i in prompt.images)
    config = EngineConfig(
        max_model_len=1024, kv_cache_tokens=1024, prefix_cache=False, target_gap_ms="none"
    )
    engine = Engine.load(directory, config)
    banned = (*(i for i in range(64) if i != 2), *range(764, 800))
    params = replace(GREEDY, max_tokens=6, ignore_eos=False, banned_token_ids=banned)
    return run_alone(engine, prompt.token_ids, params, images=images).logprobs


def assert_same(found: Any, wanted: list[Any], stand: Stand) -> None:
    """The same tokens with the same log-probs, as far as the two best were apart."""
    entries = found.choices[0].logprobs.content
    assert entries and len(entries) <= len(wanted)
    for entry, expected in zip(entries, wanted, strict=False):
        if bytes(entry.bytes) != stand.chat.vocabulary.token_bytes[expected.token_id]:
            assert expected.top[0][1] - expected.top[1][1] <= SAME_LOGPROB
            return
        assert entry.logprob == pytest.approx(expected.logprob, abs=SAME_LOGPROB)


async def test_pictures_in_chunks_and_in_company_answer_as_alone(
    stand: Stand, directory: Path
) -> None:
    names = list(PICTURES) * 2
    answers = await asyncio.gather(*(answer(stand, PICTURES[name]) for name in names))
    for name, found in zip(names, answers, strict=True):
        assert_same(found, alone(directory, PICTURES[name]), stand)
    await stand.idle()


async def test_prefix_of_a_picture_is_found_again_and_no_other_picture_is(stand: Stand) -> None:
    def cached(found: Any) -> int:
        return int(found.usage.prompt_tokens_details.cached_tokens)

    question = ("What is it?", noise(140, 140, 1))
    first = await answer(stand, question)
    again = await answer(stand, question)
    assert cached(first) == 0 and cached(again) >= 30
    assert_entries_close(again, first)
    other = await answer(stand, ("What is it?", noise(140, 140, 2)))
    # The settings before the picture are the same, its own blocks are not.
    assert cached(other) < 16 * 4 and cached(other) < cached(again)
    turns = [*user(*question), {"role": "assistant", "content": "A picture."}, *user("And now?")]
    after = await ask(stand, messages=turns, max_tokens=2)
    assert cached(after) > cached(other)
    await stand.idle()


def assert_entries_close(found: Any, wanted: Any) -> None:
    pairs = zip(found.choices[0].logprobs.content, wanted.choices[0].logprobs.content, strict=False)
    for entry, expected in pairs:
        if entry.token != expected.token:
            top = expected.top_logprobs
            assert top[0].logprob - top[1].logprob <= SAME_LOGPROB
            return
        assert entry.logprob == pytest.approx(expected.logprob, abs=SAME_LOGPROB)


async def test_equal_bytes_of_another_size_or_mode_share_nothing(stand: Stand) -> None:
    """A key made of the raw bytes alone would take these for one picture."""
    wide = noise(56, 28, 7)
    high = Image.frombytes("RGB", (28, 56), wide.tobytes())
    grey = Image.frombytes("L", (84, 56), noise(84, 56, 8, "L").tobytes())
    indexed = Image.frombytes("P", (84, 56), grey.tobytes())
    indexed.putpalette([(7 * i) % 256 for i in range(768)])
    assert wide.tobytes() == high.tobytes() and grey.tobytes() == indexed.tobytes()
    for one, two in ((wide, high), (grey, indexed)):
        wanted = await answer(stand, ("?", one))
        assert wanted.choices[0].logprobs.content
        found = await answer(stand, ("?", two))
        assert found.usage.prompt_tokens_details.cached_tokens < 64
        stand.engine.clear_prefix_cache()
        assert_entries_close(await answer(stand, ("?", two)), found)


async def test_usage_counts_pictures_the_same_streamed_or_not(stand: Stand) -> None:
    options: dict[str, Any] = {
        "messages": user("Two:", noise(100, 60), noise(28, 28)),
        "max_tokens": 4,
    }
    whole = await ask(stand, **options)
    assert whole.usage.prompt_tokens_details.image_tokens == 15 + 2
    stream = await ask(stand, stream=True, stream_options={"include_usage": True}, **options)
    usage = [chunk.usage async for chunk in stream][-1]
    assert usage is not None
    mine, theirs = usage.model_dump(), whole.usage.model_dump()
    # The second one found the first one's blocks; nothing else may differ.
    assert mine["prompt_tokens_details"].pop("cached_tokens") >= 16
    assert theirs["prompt_tokens_details"].pop("cached_tokens") == 0
    assert mine == theirs


async def test_largest_picture_and_several_choices(stand: Stand) -> None:
    """1540 pixels a side are 55 merged patches; a longer side is scaled down to them."""
    for size in ((1540, 84), (3080, 168)):
        found = await ask(stand, messages=user("?", noise(*size)), n=2, seed=1, max_tokens=3)
        assert found.usage.prompt_tokens_details.image_tokens == 3 * 56
        assert len(found.choices) == 2
    await stand.idle()


async def test_pictures_in_responses_and_a_schema_that_holds(stand: Stand) -> None:
    parts = [
        {"type": "input_text", "text": "What?"},
        {"type": "input_image", "image_url": data_url(noise(100, 60)), "detail": "auto"},
    ]
    found = await stand.client.responses.create(
        model="tiny", input=[{"role": "user", "content": parts}], max_output_tokens=4, temperature=0
    )
    chat = await ask(stand, messages=user("What?", noise(100, 60)), max_tokens=4)
    assert found.usage.input_tokens == chat.usage.prompt_tokens
    assert found.output_text == chat.choices[0].message.content
    form = {"type": "choice", "choices": ["cat", "dog"]}
    held = await ask(stand, messages=user("?", noise(60, 60)), extra_body={"response_format": form})
    assert held.choices[0].message.content in ("cat", "dog")


@pytest.mark.parametrize("kind", ["bf16", "mistral-fp8", "export"])
async def test_every_kind_of_checkpoint_sees_thinks_and_keeps_to_a_schema(
    tmp_path: Path, kind: str
) -> None:
    """bf16, FP8 as Mistral publishes it, and our own mixed export, straight from its files."""
    source = tmp_path / "source"
    write_model(source, vision=True, dialect="none" if kind == "bf16" else "mistral-fp8")
    if kind == "export":
        options = ("--recipe", "nvfp4-everywhere", "--method", "none")
        assert main(["quantize", str(source), str(tmp_path / "export"), *options]) == 0
        assert (tmp_path / "export" / "tekken.json").exists()
        source = tmp_path / "export"
    form = {"type": "choice", "choices": ["cat", "dog"]}
    async with standing(source, max_model_len=512, kv_cache_tokens=1024) as stand:
        stand.force(THINK, "hm", END_THINK)
        found = await ask(
            stand,
            messages=user("?", noise(60, 90)),
            reasoning_effort="high",
            extra_body={"response_format": form},
        )
        message = found.choices[0].message
        assert message.reasoning == "hm" and message.content in ("cat", "dog")
        assert found.usage.prompt_tokens_details.image_tokens == 4 * (3 + 1)
        await stand.idle()


async def test_picture_too_large_for_the_context_is_400_and_the_next_works(stand: Stand) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await ask(stand, messages=user("?", noise(1000, 1000)))
    assert caught.value.code == "context_length_exceeded"
    assert (await ask(stand, messages=user("?", noise(30, 30)))).choices[0].finish_reason
    await stand.idle()
