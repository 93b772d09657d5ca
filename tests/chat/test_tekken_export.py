"""A tokenizer.json made of a tekken.json: the same ids for text, control tokens for their names."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.chat.tekken_export import hub_tokenizer
from halfbyte.chat.tokens import load_chat
from halfbyte.errors import CheckpointError

TEKKEN = Path(__file__).parent.parent / "data" / "chat" / "tekken" / "tekken.json"
CHAT = load_chat(TEKKEN.parent)
FILES = hub_tokenizer(TEKKEN)
MADE = tokenizers.Tokenizer.from_str(FILES["tokenizer.json"].decode())

# Words, scripts, blanks of all kinds, digits, cases, marks, emoji: what the pattern splits by.
WORDS = (
    "the", " of", "Paris", "don't", "I'M", "CamelCase", "été", "naïve", "ﬁ", "ß", "İ", "ǅ",
    "a\u0301", "漢字", "かな", "привет", "مرحبا", "שלום", "हिन्दी", "한국어", "ไทย", "😀",
    "👩\u200d👩\u200d👧", "🇩🇪", " ", "  ", "   ", "\n", "\r\n", "\t", "\u00a0", "\u3000",
    "\u2028", "\x85", "\x0b", "1", "4567", "٣٤", "//", "{}", "():", "==", "->", "aaaaaaa", "[",
    "]", "<s", "s>", "IMG", "\0", "\x1b", "\ufffd",
)  # fmt: skip
texts = st.one_of(
    st.lists(st.sampled_from(WORDS), max_size=30).map("".join),
    st.text(),
    st.text(st.characters(max_codepoint=0x2FF)),
    st.text(st.sampled_from("abAB 01\n'-_"), max_size=80),
)


def without_names(text: str) -> str:
    for name in CHAT.vocabulary.control:
        text = text.replace(name, "")
    return text


@settings(max_examples=300, deadline=None)
@given(texts)
def test_text_has_the_ids_of_mistral_common(text: str) -> None:
    text = without_names(without_names(text)).encode("utf-8", "ignore").decode()
    assert MADE.encode(text).ids == CHAT.vocabulary.encode_text(text)
    assert MADE.decode(MADE.encode(text).ids, skip_special_tokens=False) == text


def test_names_of_control_tokens_are_control_tokens() -> None:
    for name, token_id in CHAT.vocabulary.control.items():
        assert MADE.encode(f"a{name}b").ids.count(token_id) == 1
        assert MADE.id_to_token(token_id) == name
    assert MADE.get_vocab_size() == CHAT.vocabulary.size


def test_transformers_reads_it_offline(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    made = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (made.bos_token, made.eos_token, made.eos_token_id) == ("<s>", "</s>", 2)
    control = CHAT.vocabulary.control
    assert made("[IMG]")["input_ids"] == [control["[IMG]"]]
    tools: list[dict[str, Any]] = [
        {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
    ]
    conversations: list[list[dict[str, Any]]] = [
        [{"role": "user", "content": "Hello"}],
        [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Hello, é 漢"},
            {"role": "assistant", "content": "Hi."},
            {"role": "user", "content": "Again"},
        ],
    ]
    for messages in conversations:
        for offered in ([], tools):
            ids = made.apply_chat_template(messages, tools=offered or None, return_dict=False)
            assert tuple(ids) == CHAT.encode(messages, tools=offered).token_ids


def test_a_name_that_text_has_too_is_refused(tmp_path: Path) -> None:
    value = json.loads(TEKKEN.read_text())
    value["special_tokens"][20]["token_str"] = "e"
    (tmp_path / "tekken.json").write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match="control token and a piece of text"):
        hub_tokenizer(tmp_path / "tekken.json")


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(CheckpointError):
        hub_tokenizer(tmp_path / "tekken.json")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_published_vocabulary_has_the_same_ids(tmp_path: Path) -> None:
    """130,000 pieces, as mistral-common ships them."""
    import mistral_common

    shipped = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
    shutil.copy(shipped, tmp_path / "tekken.json")
    vocabulary = load_chat(tmp_path).vocabulary
    made = tokenizers.Tokenizer.from_str(
        hub_tokenizer(tmp_path / "tekken.json")["tokenizer.json"].decode()
    )

    @settings(max_examples=3000, deadline=None)
    @given(texts)
    def check(text: str) -> None:
        for name in vocabulary.control:
            text = text.replace(name, "")
        text = text.encode("utf-8", "ignore").decode()
        assert made.encode(text).ids == vocabulary.encode_text(text)

    check()
