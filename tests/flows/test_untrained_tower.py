"""A text model is given an untrained tower: pictures get through every room, and it says so."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from engine_driver import GREEDY, run_alone
from flows.stand import DATA, ask, standing
from flows.test_server_images import noise, user
from halfbyte.card.facts import read_checkpoint
from halfbyte.chat.tokens import load_chat
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.checkpoint.untrained_tower import IMAGE_TOKENS, add_untrained_tower
from halfbyte.cli.main import main
from halfbyte.engine.config import EngineConfig
from halfbyte.engine.core import Engine
from halfbyte.evals.running.endpoint import describe_checkpoint
from halfbyte.model.tiny import tiny_config, write_tiny_checkpoint
from tolerances import SAME_LOGPROB


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Two random layers under the small ChatML tokenizer, its embedding also its head."""
    path = tmp_path / "text"
    size = load_chat(DATA / "chatml").vocabulary.size
    config = tiny_config(layers=2, tied_head=True)
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=size))
    write_tiny_checkpoint(path, config=config)
    for file in (DATA / "chatml").iterdir():
        shutil.copy(file, path)
    return path


def test_text_stays_what_it_was_and_equal_seeds_give_equal_bytes(
    tmp_path: Path, text: Path
) -> None:
    add_untrained_tower(text, tmp_path / "a", seed=3)
    add_untrained_tower(text, tmp_path / "b", seed=3)
    add_untrained_tower(text, tmp_path / "c", seed=4)
    weights = [(tmp_path / x / "model.safetensors").read_bytes() for x in "abc"]
    assert weights[0] == weights[1] != weights[2]
    before, after = Checkpoint.open(text), Checkpoint.open(tmp_path / "a")
    num_rows = before.config.text.vocab_size
    for name in before.names():
        assert after.tensor(name)[: before.shape(name)[0]].equal(before.tensor(name))
    assert after.config.text.vocab_size % 64 == 0
    old, new = load_chat(text), load_chat(tmp_path / "a")
    prompt = old.encode([{"role": "user", "content": "Hello, who is it?"}]).token_ids
    assert new.encode([{"role": "user", "content": "Hello, who is it?"}]).token_ids == prompt
    assert [new.vocabulary.control[name] for name in IMAGE_TOKENS] == list(
        range(num_rows, num_rows + 3)
    )
    # The new rows take next to nothing from the old ones: log-probs of text hardly move.
    config = EngineConfig(max_model_len=160, kv_cache_tokens=640)
    params = dataclasses.replace(GREEDY, max_tokens=1)
    found = [
        run_alone(Engine.load(path, config), prompt, params).logprobs[0]
        for path in (text, tmp_path / "a")
    ]
    assert found[0].token_id == found[1].token_id
    # Random logits of a random model are all near their mean, so 64 more of 512 do count here.
    share = after.config.text.vocab_size / num_rows - 1
    assert abs(found[0].logprob - found[1].logprob) < share + SAME_LOGPROB


async def test_pictures_reach_the_answer_in_both_arms_and_the_note_goes_with_them(
    tmp_path: Path, text: Path
) -> None:
    torch.set_num_threads(2)
    paths = {name: str(tmp_path / name) for name in ("bf16", "fp8", "mixed")}
    assert main(["import", str(text), paths["bf16"], "--untrained-tower"]) == 0
    assert main(["import", paths["bf16"], paths["fp8"], "--to", "mistral-fp8"]) == 0
    recipe = ("--recipe", "nvfp4-everywhere", "--method", "none")
    assert main(["quantize", paths["fp8"], paths["mixed"], *recipe]) == 0
    towers = [Checkpoint.open(path) for path in paths.values()]
    for name in towers[0].names():
        if name.startswith(("encoder.", "projector.")):
            assert all(tower.tensor(name).equal(towers[0].tensor(name)) for tower in towers)
    for path in (Path(paths["fp8"]), Path(paths["mixed"])):
        assert "untrained" in describe_checkpoint(path)["note"]
        assert "untrained" in read_checkpoint(path).note
        async with standing(path, max_model_len=512, kv_cache_tokens=1024) as stand:
            answers = [
                await ask(stand, messages=user("What is it?", noise(900, 500, seed)), max_tokens=4,
                          logprobs=True, top_logprobs=5)
                for seed in (1, 2, 1)
            ]  # fmt: skip
            # 448 x 248 pixels are 16 x 9 merged patches, each row with its break or end.
            assert answers[0].usage.prompt_tokens_details.image_tokens == 9 * (16 + 1)
            first, other, again = (
                [t.logprob for t in a.choices[0].logprobs.content[0].top_logprobs] for a in answers
            )
            assert first == pytest.approx(again, abs=SAME_LOGPROB)
            assert first != pytest.approx(other, abs=SAME_LOGPROB)
            await stand.idle()


def test_what_cannot_get_a_tower_is_refused(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    add_untrained_tower(text, tmp_path / "sees")
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(text / name, tmp_path / "bare")
    for source, message in (
        (str(tmp_path / "sees"), "has a vision tower already"),
        (str(tmp_path / "bare"), "a tokenizer.json only"),
        ("smollm2", "import it first"),
    ):
        assert main(["import", source, out, "--untrained-tower"]) == 2
        assert message in capsys.readouterr().err
    assert main(["import", str(text), out, "--untrained-tower", "--to", "mistral-fp8"]) == 2
    assert "no other option" in capsys.readouterr().err
    assert not Path(out).exists()
