"""Two models behind pictures: what counts, and that clipped image rows show."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from halfbyte.chat.tokens import load_chat
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.cli.main import main
from halfbyte.engine.request import ImageInput
from halfbyte.errors import RequestError, UsageError
from halfbyte.fidelity.comparison import comparison_of
from halfbyte.fidelity.models import compare_models, load_model
from halfbyte.fidelity.seen import image_prompts, is_right, prompt_logprobs
from halfbyte.model.attention import DenseAttend
from halfbyte.model.decoder import Step
from halfbyte.model.load import load_decoder, load_vision
from halfbyte.pictures import normalized
from seeing_model import write_seeing


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source, a copy whose scales are too small in one layer, and a text."""
    root = tmp_path_factory.mktemp("seen")
    write_seeing(root / "base", layers=2)
    write_seeing(root / "clipping", layers=2)
    shard = next((root / "clipping").glob("*.safetensors"))
    tensors = load_file(shard)
    for name in tensors:
        if ".layers.1." in name and name.endswith("activation_scale"):
            tensors[name] = tensors[name] / 64
    save_file(tensors, shard, {"format": "pt"})
    words = [f"word {n} and {n * n % 97} more" for n in range(120)]
    (root / "text.txt").write_text("\n".join(words), "utf-8")
    return root


def test_what_counts_is_text_behind_pictures_and_its_answer(root: Path) -> None:
    prompts = image_prompts(root / "base", "drawn", 7)
    again = image_prompts(root / "base", "drawn", 7)
    assert [prompt.token_ids for prompt in prompts] == [prompt.token_ids for prompt in again]
    layout = load_chat(root / "base").image_layout
    assert layout is not None and len(prompts) == 7
    of_pictures = {layout.image_token_id, layout.break_token_id, layout.end_token_id}
    for prompt in prompts:
        first = prompt.images[0]
        ids = prompt.token_ids
        behind = range(first.offset + first.num_tokens, len(ids))
        wanted = [n - 1 for n in behind if ids[n] not in of_pictures]
        assert list(prompt.counted) == wanted
        assert 0 < len(prompt.answer_positions) < len(prompt.counted)
        assert prompt.answer_positions == prompt.counted[-len(prompt.answer_positions) :]


def test_scores_of_a_prompt_are_those_of_the_decoder(root: Path) -> None:
    checkpoint = Checkpoint.open(root / "base")
    prompt = image_prompts(root / "base", "drawn", 7)[6]  # two pictures
    assert len(prompt.images) == 2 and checkpoint.config.vision is not None
    engine = load_model("base", root / "base", "weight_only", 4096).engine
    logprobs_NV = prompt_logprobs(engine, prompt)
    vision = load_vision(checkpoint)
    assert vision is not None
    vectors = vision([torch.from_numpy(normalized(i.pixels)) for i in prompt.images])
    ids = torch.tensor(prompt.token_ids)
    at = torch.nonzero(ids == checkpoint.config.vision.image_token_id)[:, 0]
    positions = torch.arange(len(ids))
    attend = DenseAttend([0, len(ids)])
    step = Step(ids, positions, attend, None, at, torch.cat(vectors))
    whole = load_decoder(checkpoint)(step)[list(prompt.counted)].log_softmax(-1)
    assert float((whole - logprobs_NV).abs().max()) < 0.1  # paged and dense attention in bf16
    blind = Step(ids, positions, DenseAttend([0, len(ids)]))
    unseen = load_decoder(checkpoint)(blind)[list(prompt.counted)].log_softmax(-1)
    assert float((unseen - logprobs_NV).abs().max()) > 0.2
    images = tuple(ImageInput.of(i.pixels, i.offset, i.num_tokens) for i in prompt.images)
    with pytest.raises(RequestError, match="are free"):
        list(engine.score(prompt.token_ids[:3], images=images))


def test_an_answer_is_right_if_every_token_is_the_likeliest(root: Path) -> None:
    prompt = image_prompts(root / "base", "drawn", 1)[0]
    perfect = torch.zeros(len(prompt.counted), 5000)
    for row, at in enumerate(prompt.counted):
        perfect[row, prompt.token_ids[at + 1]] = 1.0
    assert is_right(prompt, perfect)
    asked = len(prompt.counted) - len(prompt.answer_positions)
    perfect[:asked] = 0.0  # what is asked need not be guessed
    assert is_right(prompt, perfect)
    perfect[-1] = 0.0
    perfect[-1, 4999] = 1.0
    assert not is_right(prompt, perfect)


def test_clipped_image_rows_show_in_the_comparison(root: Path) -> None:
    prompts = image_prompts(root / "base", "drawn", 7)
    found = compare_models(
        root / "base",
        [("same", root / "base", "weight_only"), ("clipping", root / "clipping", "declared")],
        root / "text.txt",
        window_tokens=64,
        prompts=prompts,
    )
    same, clipping = (row.images for row in found.candidates)
    assert same is not None and clipping is not None
    assert same.kl_mean == pytest.approx(0, abs=1e-9) and same.top1_agreement == 1
    assert same.lost == same.won == 0 and same.prompts == 7
    assert clipping.kl_mean > 0.01 and clipping.kl_interval is not None
    assert clipping.tokens == sum(len(prompt.counted) for prompt in prompts)
    assert clipping.answer_tokens == sum(len(prompt.answer_positions) for prompt in prompts)
    told = json.loads(json.dumps(found.as_dict()))
    assert comparison_of(told) == found
    assert "behind pictures" in found.table()


def test_compare_takes_pictures_of_ones_own_and_warns(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.full((60, 40, 3), 90, np.uint8)).save(buffer, "PNG")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    rows: list[dict[str, str]] = [{"text": "no picture"}]
    rows += [{"image": name, "prompt": "What?", "response": "Grey."} for name in ("a.png", url)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    assert len(image_prompts(root / "base", str(path))) == 2
    arguments = ["compare", str(root / "base"), str(root / "clipping"), "--mode", "declared"]
    arguments += ["--text", str(root / "text.txt"), "--window-tokens", "64", "--tokens", "128"]
    assert main([*arguments, "--pictures", str(path)]) == 0
    told = capsys.readouterr()
    assert "behind pictures" in told.out and "2 conversations" in told.out
    assert "clip image rows" in told.err and "decoder.1." in told.err
    path.write_text('{"text": "none"}\n', "utf-8")
    with pytest.raises(UsageError, match="no row shows a picture"):
        image_prompts(root / "base", str(path))
