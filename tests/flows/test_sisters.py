"""Each sister model's whole way, small: quantize, verify, serve an answer, compare.

Two in every run, all of them among the slow tests. Calibration is real, over random token ids;
no recipe is named, so that the one fitted to the depth is taken.
"""

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from flows.stand import ask, standing
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.cli.main import main
from sisters import SISTERS, Sister, always
from tokenizers_of_sisters import write_tokenizer

LAYERS = 3
WORDS = "A quiet house by the sea. Who lived there, and for how long? Nobody knows. "


def picture() -> dict[str, Any]:
    """Of three patches of 28 pixels by two, or as many smaller ones."""
    file = io.BytesIO()
    Image.new("RGB", (84, 56), (200, 30, 90)).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def check_formats(source: Checkpoint, out: Checkpoint) -> None:
    """What the fitted recipe says of three layers, and input scales for all that is quantized."""
    for layer in range(LAYERS):
        wanted = "fp8" if layer in (0, LAYERS - 1) else "nvfp4"
        assert out.format_of(f"decoder.{layer}.mlp.up") == wanted
        assert out.format_of(f"decoder.{layer}.attention.q") == "fp8"
        for linear in ("attention.q", "attention.o", "mlp.gate", "mlp.down"):
            scale = out.scale(f"decoder.{layer}.{linear}.input_scale")
            # Measured: no constant, and not what the source declares of its random self.
            assert scale not in (1.0, 448.0)
            if source.format_of(f"decoder.{layer}.{linear}") == "fp8":
                assert scale != source.scale(f"decoder.{layer}.{linear}.input_scale")
    assert out.config == source.config


@pytest.mark.timeout(240)
@pytest.mark.parametrize("sister", always(SISTERS, "ministral-3-3b", "mistral-large-2-123b"))
async def test_quantize_verify_serve_compare(
    sister: Sister, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    config = sister.write(source, layers=LAYERS, vocab_size=1100)
    write_tokenizer(source, sister.tokenizer, images=config.vision is not None)
    ids = torch.randint(100, 760, (2, 48), generator=torch.Generator().manual_seed(0))
    save_file({"batch0.input_ids": ids}, tmp_path / "tokens.safetensors")

    command = ["quantize", source, out, "--calibration-tokens", tmp_path / "tokens.safetensors"]
    assert main([*map(str, command)]) == 0
    assert f"recipe mixed, fitted to {LAYERS} layers" in capsys.readouterr().out
    assert main(["verify", str(out), "--against", str(source)]) == 0
    check_formats(Checkpoint.open(source), Checkpoint.open(out))

    content: Any = "Hello?"
    if config.vision is not None:
        content = [picture(), {"type": "text", "text": "What is it?"}]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": content},
    ]
    async with standing(out, max_model_len=256, kv_cache_tokens=512, max_sequences=2) as stand:
        first, again = [
            await ask(stand, messages=messages, max_tokens=6, logprobs=True) for _ in range(2)
        ]
        assert first.usage.completion_tokens >= 1
        assert first.choices[0].finish_reason in ("stop", "length")
        assert again.choices[0].message.content == first.choices[0].message.content
        if config.vision is not None:
            side = config.vision.patch_size * config.vision.spatial_merge_size
            assert first.usage.prompt_tokens > -(-84 // side) * -(-56 // side)
        # Grammars know the bytes of this vocabulary.
        held = await ask(
            stand,
            messages=[{"role": "user", "content": "?"}],
            max_tokens=12,
            extra_body={"response_format": {"type": "regex", "regex": "(sea|é) [0-4]"}},
        )
        assert re.fullmatch("(sea|é) [0-4]", held.choices[0].message.content)
        await stand.idle()

    text = tmp_path / "text.txt"
    text.write_text(WORDS * 4)
    figures = tmp_path / "figures.json"
    compare = ["compare", source, out, "--text", text, "--json", figures]
    assert main([*map(str, compare), "--window-tokens", "64"]) == 0
    (row,) = json.loads(figures.read_text())["candidates"]
    # Rounded, and still the same model: unrelated logits of such models are several nats apart.
    assert 0 < row["kl_mean"] < 1
    assert row["top1_agreement"] > 0.4
