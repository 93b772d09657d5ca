"""The Python entry says what the engine says, token for token, and stays quick to import."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import halfbyte
from engine_driver import load as load_tokens
from engine_driver import request, run
from halfbyte import SamplingParams
from halfbyte.chat.router import Content
from halfbyte.errors import RequestError, UsageError
from halfbyte.library import Engine, Prompt
from halfbyte.recipe.schema import load_recipe

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
PROMPTS: list[Prompt] = ["word 1 and", "three", [5, 6, 7], [{"role": "user", "content": "Hello"}]]
OPTIONS: dict[str, Any] = {"max_model_len": 160, "kv_cache_tokens": 640}


@pytest.fixture(scope="module")
def directory(models: Path) -> Path:
    return models / "fp8"


@pytest.fixture(scope="module")
def engine(directory: Path) -> Iterator[Engine]:
    with Engine(directory, device="cpu", **OPTIONS) as loaded:
        yield loaded
        loaded.tokens.check()
        assert not loaded.tokens.has_work()


def test_answers_are_those_of_the_engine_alone_and_together(
    engine: Engine, directory: Path
) -> None:
    vocabulary = engine.chat.vocabulary
    padding = tuple(range(vocabulary.size, engine.tokens.vocab_size))
    plain = load_tokens(directory, **OPTIONS, kv_cache="auto")
    together = engine.generate(PROMPTS, GREEDY)
    assert [len(answer.token_ids) for answer in together] == [24] * 4
    for prompt, answer in zip(PROMPTS[:2], together[:2], strict=True):
        params = replace(GREEDY, banned_token_ids=padding)
        alone = run(plain, [request("a", engine.encode(prompt).token_ids, params)])["a"]
        assert list(answer.token_ids) == alone.token_ids
        assert answer.text == engine.chat.vocabulary.decode(alone.token_ids)
        assert answer.finish_reason == "length"
        assert answer.prompt_tokens == len(engine.encode(prompt).token_ids)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_streamed_pieces_join_to_the_answer(engine: Engine, prompt: Prompt) -> None:
    [answer] = engine.generate([prompt], GREEDY)
    pieces = list(engine.stream(prompt, GREEDY))
    assert "".join(piece.text for piece in pieces if isinstance(piece, Content)) == answer.text


def test_streams_read_in_turns_and_closed_early_leave_nothing_behind(engine: Engine) -> None:
    wanted = [answer.text for answer in engine.generate(PROMPTS[:2], GREEDY)]
    first, second, third = (engine.stream(prompt, GREEDY) for prompt in PROMPTS[:3])
    next(third)
    found = ["", ""]
    for pair in zip(first, second, strict=False):
        for index, piece in enumerate(pair):
            found[index] += piece.text
    for index, rest in enumerate((first, second)):
        found[index] += "".join(piece.text for piece in rest)
    third.close()
    assert all(text.startswith(seen[: len(text)]) for text, seen in zip(wanted, found, strict=True))
    assert not engine.tokens.has_work()


def test_a_stop_text_ends_the_answer_and_its_tokens(engine: Engine) -> None:
    [whole] = engine.generate(["word 1 and"], replace(GREEDY, logprobs=0))
    stop = whole.text[len(whole.text) // 2 :][:3]
    [cut] = engine.generate(["word 1 and"], replace(GREEDY, logprobs=0), stop=[stop])
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert whole.token_ids[: len(cut.token_ids)] == cut.token_ids
    assert len(cut.logprobs) == len(cut.token_ids) < len(whole.token_ids)
    assert not engine.tokens.has_work()


def test_each_prompt_may_have_params_of_its_own(engine: Engine) -> None:
    params = [replace(GREEDY, max_tokens=count) for count in (1, 5)]
    found = engine.generate(PROMPTS[:2], params)
    assert [len(answer.token_ids) for answer in found] == [1, 5]


def test_what_cannot_be_answered_is_refused_and_nothing_runs_on(engine: Engine) -> None:
    for prompts, params, words in (
        (["a", [600]], GREEDY, "ids go from 0 to 511"),
        (["a", {"role": "user"}], GREEDY, "a prompt is a text, a list of messages"),
        (["a", [[1]]], GREEDY, "a prompt is a text, a list of messages"),
        (["a", []], GREEDY, "the prompt has no tokens"),
        ("a", GREEDY, "a list of prompts, not one text"),
        (["a"], [GREEDY, GREEDY], "1 prompts need as many params"),
        (["a"], replace(GREEDY, top_p=2.0), "top_p is 2.0"),
    ):
        with pytest.raises(RequestError, match=words):
            engine.generate(prompts, params)  # type: ignore[arg-type]
        assert not engine.tokens.has_work()


def test_an_option_that_nobody_knows_is_refused_by_name(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="an engine has no option 'max_len'"):
        Engine(directory, max_len=3)
    with pytest.raises(UsageError, match="quantize has no option 'outputs'"):
        halfbyte.quantize(directory, tmp_path / "out", "fp8", outputs=3)


def test_quantize_is_a_function_whatever_was_imported(models: Path, tmp_path: Path) -> None:
    import halfbyte.quantize.pipeline  # which makes the room an attribute of the package

    recipe = load_recipe("fp8")
    few = replace(recipe.calibration, samples=2, tokens_per_sample=32)
    result = halfbyte.quantize(
        models / "fp8", tmp_path / "out", replace(recipe, calibration=few), with_errors=False
    )
    assert result.output == tmp_path / "out"
    opened = halfbyte.Checkpoint.open(tmp_path / "out")
    assert sum(map(opened.num_bytes, opened.names())) <= result.num_bytes


def test_importing_the_package_is_quick_and_brings_no_torch() -> None:
    code = (
        "import sys, halfbyte; assert 'torch' not in sys.modules;"
        "assert set(halfbyte.__all__) <= set(dir(halfbyte));"
        "halfbyte.SamplingParams; sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(halfbyte.__file__).parents[1])},
    )
    assert done.returncode == 0, done.stderr


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'generate'"):
        _ = halfbyte.generate
