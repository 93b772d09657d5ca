"""tokenizer.json with byte fallback, into which SentencePiece's models are converted.

Mistral Large 2 has one. tests/data/chat/spm-v3 is a small cut of that vocabulary; ids beside it are
mistral-common's over the same cut, by SentencePiece itself.
"""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from halfbyte.chat.detokenize import TextStream
from halfbyte.chat.template_format import TemplateFormat, load_template_format
from halfbyte.errors import CheckpointError

DATA = Path(__file__).parent.parent / "data" / "chat" / "spm-v3"
PROMPTS = json.loads((DATA / "prompts.json").read_text())
WORDS = (
    "hello",
    " world",
    "\n",
    "  ",
    "é",
    "你好",
    "😀",
    "[INST]",
    "</s>",
    "▁",
    "<0x41>",
    "\t",
    "'s",
)


@pytest.fixture(scope="module")
def chat() -> TemplateFormat:
    return load_template_format(DATA)


def text(dice: random.Random) -> str:
    return "".join(dice.choice(WORDS) for _ in range(dice.randrange(8)))


@pytest.mark.parametrize("case", PROMPTS["conversations"], ids=lambda case: str(len(case["ids"])))
def test_prompts_are_mistral_commons(chat: TemplateFormat, case: dict[str, Any]) -> None:
    """Typed names of control tokens included, which transformers reads as control tokens."""
    found = chat.encode(case["messages"], tools=case.get("tools", ()))
    assert list(found.token_ids) == case["ids"]


def test_any_text_comes_back(chat: TemplateFormat) -> None:
    dice = random.Random(0)
    vocabulary = chat.vocabulary
    for _ in range(300):
        one = text(dice)
        ids = vocabulary.encode_text(one)
        assert not any(map(vocabulary.is_control, ids))
        # The sign for a space is one, in this kind.
        meant = one.replace("▁", " ")
        assert vocabulary.decode(ids) == meant
        stream = TextStream(vocabulary)
        assert "".join(map(stream.feed, ids)) + stream.flush() == meant


@pytest.mark.parametrize("scheme", ["first", "always", "never", "normalizer"])
def test_segments_are_those_of_transformers(scheme: str, tmp_path: Path) -> None:
    """Text before, between and behind control tokens, however the file writes a first space."""
    shutil.copytree(DATA, tmp_path / "t")
    path = tmp_path / "t" / "tokenizer.json"
    value = json.loads(path.read_text())
    if scheme == "normalizer":
        value["pre_tokenizer"] = None
        value["normalizer"] = {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        }
    else:
        value["pre_tokenizer"]["prepend_scheme"] = scheme
    path.write_text(json.dumps(value))
    turns = "{% for m in messages %}{{ m.content + '[INST]' }}{% endfor %}"
    (tmp_path / "t" / "chat_template.jinja").write_text(turns)
    chat = load_template_format(tmp_path / "t")
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(path))
    dice = random.Random(scheme)
    plain = [word for word in WORDS if word not in ("[INST]", "</s>")]
    for _ in range(60):
        said = ["".join(dice.choice(plain) for _ in range(dice.randrange(1, 6))) for _ in "ab"]
        messages = [{"role": "user", "content": one} for one in said]
        expected = theirs("[INST]".join([*said, ""]), add_special_tokens=False)["input_ids"]
        assert list(chat.encode(messages).token_ids) == expected, said


def without_a_byte(value: dict[str, Any]) -> None:
    vocab = value["model"]["vocab"]
    vocab["other"] = vocab.pop("<0x80>")


def without_spaces(value: dict[str, Any]) -> None:
    value["pre_tokenizer"] = {"type": "Whitespace"}


@pytest.mark.parametrize(
    ("change", "message"),
    [(without_a_byte, "without a token <0x80>"), (without_spaces, "U\\+2581")],
)
def test_files_that_would_lose_text_are_refused(
    change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    shutil.copytree(DATA, tmp_path / "t")
    path = tmp_path / "t" / "tokenizer.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match=message):
        load_template_format(tmp_path / "t")


@pytest.mark.parametrize("case", PROMPTS["texts"], ids=lambda case: repr(case["text"]))
def test_a_plain_prompt_begins_as_mistral_commons(
    chat: TemplateFormat, case: dict[str, Any]
) -> None:
    """A space of one's own is the first one here, and a second one there."""
    found = list(chat.encode_prompt(case["text"]).token_ids)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(DATA / "tokenizer.json"))
    assert found == [1, *theirs(case["text"], add_special_tokens=False)["input_ids"]]
    if not case["text"].startswith(" "):
        assert found == case["ids"]
