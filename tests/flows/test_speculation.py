"""Speculation through the wire: every answer is the one without, and the figures say what was done.

The texts are made to repeat themselves, so that lookup guesses all the time.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine_driver import needs_exact_kernels
from flows.stand import Script, Stand, ask, standing, streamed_text, write_model
from halfbyte.config import ModelConfig
from halfbyte.engine.request import GenerationRequest
from halfbyte.model.tiny import tiny_config, write_tiny_eagle

PERSON = {
    "type": "object",
    "properties": {
        "names": {"type": "array", "items": {"enum": ["anna", "anna bella"]}, "maxItems": 6},
        "ages": {"type": "array", "items": {"type": "integer", "maximum": 99}, "maxItems": 5},
    },
    "required": ["names", "ages"],
    "additionalProperties": False,
}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": PERSON, "strict": True}}
TEXT = "a rose is a rose is a rose "
ASKS: tuple[dict[str, Any], ...] = (
    {"max_tokens": 40},
    {"temperature": 1.0, "seed": 4, "n": 3, "max_tokens": 30},
    {"logprobs": True, "top_logprobs": 3, "frequency_penalty": 0.4},
    {"response_format": SCHEMA, "temperature": 1.0, "seed": 1, "max_tokens": 120},
    {"response_format": SCHEMA, "max_tokens": 120},
    {"extra_body": {"response_format": {"type": "regex", "regex": "(ab?c ){4,30}"}}},
    {"stop": ["rose is"], "max_tokens": 60},
    {"logit_bias": {"67": 5}, "temperature": 0.7, "top_p": 0.9, "seed": 9},
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(2)
    path = tmp_path_factory.mktemp("models") / "tiny"
    write_model(path)
    return path


def repeat_itself(stand: Stand) -> None:
    """Nudge the model to the text: it mostly repeats it, and sometimes has its own way."""
    ids = stand.chat.vocabulary.encode_text(TEXT)

    def nudge(item: GenerationRequest, generated: Sequence[int], logits_V: Tensor) -> None:
        logits_V[ids[len(generated) % len(ids)]] += 6.0

    assert isinstance(stand.script, Script)
    stand.engine._sampler._hook = nudge


async def answers(
    directory: Path, **options: Any
) -> tuple[list[dict[str, Any]], str, dict[str, Any], str]:
    """What a server says to all questions at once, then streamed; its health and its metrics."""
    async with standing(
        directory, max_model_len=512, kv_cache_tokens=4096, max_sequences=16, **options
    ) as stand:
        repeat_itself(stand)
        prompt = [{"role": "user", "content": TEXT * 3}]
        found = await asyncio.gather(*(ask(stand, messages=prompt, **item) for item in ASKS))
        text = await streamed_text(stand, messages=prompt, max_tokens=40)
        health = (await stand.http.get("/health")).json()
        metrics = (await stand.http.get("/metrics")).text
        await stand.idle()
    said = [answer.model_dump(include={"choices", "usage"}) for answer in found]
    for answer in said:
        # Whether the prompt was in the cache depends on who came first.
        answer["usage"].pop("prompt_tokens_details")
        for choice in answer["choices"]:
            for call in choice["message"].get("tool_calls") or ():
                call.pop("id")
    return said, text, health, metrics


@needs_exact_kernels
async def test_the_server_says_what_it_says_without(directory: Path, tmp_path: Path) -> None:
    wanted, wanted_text, health, _ = await answers(directory)
    assert health["engine"]["proposed_tokens"] == 0
    write_tiny_eagle(tmp_path / "eagle", _config())
    for speculative in ("ngram", str(tmp_path / "eagle")):
        found, text, health, metrics = await answers(
            directory, speculative=speculative, adaptive_speculation=False
        )
        assert found == wanted
        assert text == wanted_text
        figures = health["engine"]
        assert figures["proposed_tokens"] > 50
        if speculative == "ngram":
            assert figures["accepted_tokens"] > 20
        proposed = figures["proposed_tokens"]
        assert f"halfbyte_engine_proposed_tokens_total {float(proposed)}" in metrics


def _config() -> ModelConfig:
    config = tiny_config(layers=2)
    return replace(config, text=replace(config.text, vocab_size=800))
