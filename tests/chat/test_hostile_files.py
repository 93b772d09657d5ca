"""Tokenizer files that were made to hurt, or that nobody else could read, end in one sentence."""

import json
import random
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from halfbyte.chat import tokenizer_bounds
from halfbyte.chat.mistral_format import MistralFormat
from halfbyte.chat.template_format import TemplateFormat
from halfbyte.chat.tokenizer_json import byte_level_alphabet, load_tokenizer_json
from halfbyte.chat.tokens import ChatFormat, load_chat
from halfbyte.errors import CheckpointError, RequestError

PYTHONS_WORDS = re.compile(r"NoneType|object is|unhashable|bytes-like|'(str|int|list|dict)'|codec")
DATA = Path(__file__).parent.parent / "data" / "chat"
Change = Callable[[dict[str, Any]], None]


def loaded(folder: Path, kind: str, change: Change) -> ChatFormat:
    """The chat format of a folder whose tokenizer was changed."""
    shutil.copytree(DATA / kind, folder, dirs_exist_ok=True)
    path = folder / ("tekken.json" if kind == "tekken" else "tokenizer.json")
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    return load_chat(folder)


def added(content: str, token_id: int, special: bool = False, **flags: bool) -> dict[str, Any]:
    names = ("single_word", "lstrip", "rstrip", "normalized")
    base = dict.fromkeys(names, False)
    return {"id": token_id, "content": content, "special": special, **base, **flags}


def doubling(times: int) -> dict[str, Any]:
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    return {"type": "Sequence", "normalizers": [step] * times}


def table(charsmap: str) -> dict[str, Any]:
    """SentencePiece's normalizer; without its type the library knows it, too."""
    return {"type": "Precompiled", "precompiled_charsmap": charsmap}


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


TOKENIZERS: dict[str, Change] = {
    "id of an added token": lambda v: v["added_tokens"].append(added("<x>", 2**31)),
    "id in the vocabulary": lambda v: v["model"]["vocab"].update(zzz=2**31),
    "id just too large": lambda v: v["model"]["vocab"].update(zzz=2**22),
    "ids with a hole": lambda v: v["added_tokens"].append(added("<x>", 777)),
    "an id twice": lambda v: v["added_tokens"].append(added("<x>", 2, special=True)),
    "35 doublings": lambda v: v.update(normalizer=doubling(35)),
    "7 doublings": lambda v: v.update(normalizer=doubling(7)),
    "one long replacement": lambda v: v.update(
        normalizer={"type": "Replace", "pattern": {"Regex": "."}, "content": "b" * 1000}
    ),
    "a table that claims gigabytes": lambda v: v.update(normalizer=table("/////wAA")),
    "an empty table": lambda v: v.update(normalizer=table("AAAAAAAA")),
    "a table among other steps": lambda v: v.update(
        normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}, table("AAAAAAAA")]}
    ),
    "an added token of a book's length": lambda v: v["added_tokens"].append(
        added("x" * 10**7, 500)
    ),
    "a long added token of another id": lambda v: v["added_tokens"].append(
        added("x" * 60_000, 777)
    ),
    "empty special token": lambda v: v["added_tokens"].append(added("", 500, special=True)),
    "empty plain token": lambda v: v["added_tokens"].append(added("", 500)),
    "no vocabulary": lambda v: v["model"].pop("vocab"),
    "vocabulary of words": lambda v: v["model"].update(vocab={"a": "b"}),
    "negative id": lambda v: v["model"]["vocab"].update(zzz=-1),
    "unigram": lambda v: v.update(model={"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 0}),
    "no decoder": lambda v: v.update(decoder=None),
    "no bytes": lambda v: v.update(pre_tokenizer=None),
    "tokens that are no objects": lambda v: v.update(added_tokens=[1]),
    "a step as a list": lambda v: v.update(normalizer=["NFC"]),
    "decoders that are no list": lambda v: v["decoder"].update(decoders=True),
    "a decoder that is no object": lambda v: v["decoder"].update(decoders=["x"]),
    "a prefix of pieces": lambda v: v["model"].update(continuing_subword_prefix="##"),
    "a token of a page's length": lambda v: v["model"]["vocab"].update({"x" * 10_000: 500}),
    "ids far apart": lambda v: v["model"]["vocab"].update(zzz=500_000),
    "many added tokens": lambda v: v["added_tokens"].extend(
        added("x" * 60_000, 600 + n, special=True) for n in range(20)
    ),
    "a pattern of a book's length": lambda v: v.update(pre_tokenizer=split("a|" * 10_000)),
    "a replacement of nothing": lambda v: v.update(
        normalizer={"type": "Replace", "pattern": {"String": ""}, "content": "x"}
    ),
    "an expression that matches nothing": lambda v: v.update(
        normalizer={"type": "Replace", "pattern": {"Regex": ""}, "content": "x"}
    ),
    "more lists than any": lambda v: v.update(more=[[]] * 1_100_000),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizer_json(name: str, tmp_path: Path) -> None:
    started = time.thread_time()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json") as caught:
        loaded(tmp_path, "chatml", TOKENIZERS[name])
    assert time.thread_time() - started < 5
    assert len(str(caught.value)) < 500
    assert not PYTHONS_WORDS.search(str(caught.value))


def test_a_vocabulary_beyond_all_is_refused_before_the_library_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_bounds, "MAX_TOKENS", 100)
    monkeypatch.setattr(tokenizers.Tokenizer, "from_str", None)
    with pytest.raises(CheckpointError, match="the limit is 100"):
        loaded(tmp_path, "chatml", lambda v: None)


def test_nesting_is_no_recursion_error(tmp_path: Path) -> None:
    for kind, file in (("chatml", "tokenizer.json"), ("tekken", "tekken.json")):
        folder = tmp_path / kind
        shutil.copytree(DATA / kind, folder)
        for text in ('{"a":' * 100_000 + "1" + "}" * 100_000, "[" * 100_000):
            (folder / file).write_text(text)
            with pytest.raises(CheckpointError, match=file):
                load_chat(folder)


def set_config(**changes: Any) -> Change:
    return lambda value: value["config"].update(changes)


def zero_ranks(value: dict[str, Any]) -> None:
    for token in value["special_tokens"]:
        token["rank"] = 0


def swap_ranks(value: dict[str, Any]) -> None:
    one, two = value["special_tokens"][1:3]
    one["rank"], two["rank"] = two["rank"], one["rank"]


TEKKENS: dict[str, Change] = {
    "a billion special tokens": set_config(default_num_special_tokens=10**9),
    "half a special token": set_config(default_num_special_tokens=0.5),
    "no special token": set_config(default_num_special_tokens=0),
    "a vocabulary of 10^12": set_config(default_vocab_size=10**12),
    "special tokens of rank 0": zero_ranks,
    "special tokens in another order": swap_ranks,
    "special tokens without names": lambda v: v["special_tokens"][5].update(token_str=""),
    "special tokens that are numbers": lambda v: v.update(special_tokens=[1, 2]),
    "a pattern of letters": set_config(pattern="[a-z]+"),
    "a pattern that leaves line ends out": set_config(pattern="."),
    "a pattern that leaves trailing space out": set_config(pattern=r"\s+(?=\S)|\S+"),
    "a pattern that leaves combining marks out": set_config(pattern=r"\p{L}+|[^\p{L}\p{M}]"),
    "a pattern that is none": set_config(pattern="("),
    "no pattern": lambda v: v["config"].pop("pattern"),
    "no config": lambda v: v.pop("config"),
    "no vocabulary": lambda v: v.pop("vocab"),
    "pieces without bytes": lambda v: v["vocab"][300].pop("token_bytes"),
    "a piece that is a number": lambda v: v["vocab"].append(5),
    "a rank twice": lambda v: v["vocab"][301].update(rank=300),
    "a piece twice": lambda v: v["vocab"][301].update(v["vocab"][300], rank=301),
    "an empty piece": lambda v: v["vocab"][301].update(token_bytes=""),
    "single bytes in another order": lambda v: v["vocab"][3].update(token_bytes="Aw=="[::-1]),
    "pictures without a size": lambda v: v.update(image={"image_patch_size": 14}),
    "an unknown version": set_config(version="v99"),
    "a version that is a list": set_config(version=["v13"]),
    "a version of a book's length": set_config(version="v" * 10_000),
    "an empty pattern": set_config(pattern=""),
    "a pattern of a book's length": set_config(pattern="a|" * 10_000),
    "a pattern with half a character": set_config(pattern="\ud800"),
    "special tokens that are a number": lambda v: v.update(special_tokens=3),
    "special tokens twice": lambda v: v["special_tokens"][4].update(token_str="<s>"),
    "a vocabulary that is a number": lambda v: v.update(vocab=3),
    "bytes that are no base64": lambda v: v["vocab"][300].update(token_bytes="@@"),
    "bytes that are a list": lambda v: v["vocab"][300].update(token_bytes=[1]),
    "fewer tokens than special ones": set_config(default_vocab_size=1),
    "images that are a list": lambda v: v.update(image=[1]),
    "images without patches": lambda v: v.update(
        image={"image_patch_size": 0, "max_image_size": 1540, "spatial_merge_size": 1}
    ),
}


@pytest.mark.parametrize("name", TEKKENS)
def test_tekken_json(name: str, tmp_path: Path) -> None:
    started = time.thread_time()
    with pytest.raises(CheckpointError, match=r"tekken\.json") as caught:
        loaded(tmp_path, "tekken", TEKKENS[name])
    assert time.thread_time() - started < 5
    said = str(caught.value).partition("tekken.json")[2]
    assert len(said) < 500 and not PYTHONS_WORDS.search(said)
    # A sentence, not an exception's bare value.
    assert sum(word.isalpha() for word in said.split()) >= 3


def test_a_million_blanks_are_the_clients_error(mistral: MistralFormat) -> None:
    """More than the stack of the tokenizer's regular expression holds."""
    for blanks in (" " * 1_000_000, "x" + "\t" * 1_100_000 + "y"):
        with pytest.raises(RequestError, match="blanks or tabs in a row"):
            mistral.vocabulary.encode_text(blanks)
        with pytest.raises(RequestError, match="blanks or tabs in a row"):
            mistral.encode([{"role": "user", "content": blanks}])


@pytest.mark.parametrize("value", ["2", [2, "3"], [[2]], True, 2.0, -1, 10**6, {"a": 2}])
def test_ends_that_are_no_token_ids_are_named(value: Any, tmp_path: Path) -> None:
    shutil.copytree(DATA / "chatml", tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id"):
        load_chat(tmp_path)


def test_plain_added_tokens_keep_the_files_ids(tmp_path: Path) -> None:
    """The library would number them anew behind the special ones, which were taken out."""
    words = ["<tool_call>", "</tool_call>", "<think>", "</think>"]

    def change(value: dict[str, Any]) -> None:
        size = max(value["model"]["vocab"].values()) + 1
        value["added_tokens"] += [
            added("<|extra|>", size, special=True),
            *(added(word, size + 1 + n, rstrip=n == 3) for n, word in enumerate(words)),
            added("<|last|>", size + 5, special=True),
        ]

    chat = loaded(tmp_path, "chatml", change)
    assert isinstance(chat, TemplateFormat)
    full = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("a<think>b</think>  c", *words, "x<tool_call></tool_call>", "</think> </think>"):
        assert chat.vocabulary.encode_text(text) == full.encode(text).ids
    for name in chat.vocabulary.control:
        ids = chat.vocabulary.encode_text(f"<think>{name}</think>")
        assert not any(map(chat.vocabulary.is_control, ids))
        assert chat.vocabulary.decode(ids) == f"<think>{name}</think>"


def test_no_merge_and_no_whole_word_makes_a_control_token(tmp_path: Path) -> None:
    """A vocabulary that can build a special token out of its characters, in three ways."""

    def change(value: dict[str, Any]) -> None:
        model = value["model"]
        size = max(model["vocab"].values()) + 1
        model["vocab"]["zq"] = size  # by a merge
        model["merges"].append(["z", "q"])
        model["vocab"]["Ġzebra"] = size + 1  # by a whole word
        model["ignore_merges"] = True
        value["added_tokens"] += [
            added("zq", size, special=True),
            added("Ġzebra", size + 1, special=True),
        ]

    chat = loaded(tmp_path, "chatml", change)
    for text in ("zq", "a zq zqzq", " zebra", "a zebra", "Ġzebra"):
        ids = chat.vocabulary.encode_text(text)
        assert not any(map(chat.vocabulary.is_control, ids)), text
        assert chat.vocabulary.decode(ids) == text


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_a_control_token_for_unknown_bytes_is_none_that_can_be_typed(
    tmp_path: Path, ignore_merges: bool
) -> None:
    def change(value: dict[str, Any]) -> None:
        model = value["model"]
        size = max(model["vocab"].values()) + 1
        model["vocab"]["zq"] = size
        model["merges"].append(["z", "q"])
        model |= {"unk_token": "zq", "ignore_merges": ignore_merges}
        value["added_tokens"].append(added("zq", size, special=True))
        # And one byte that no token has.
        del model["vocab"]["~"]
        model["merges"] = [pair for pair in model["merges"] if "~" not in "".join(pair)]

    chat = loaded(tmp_path, "chatml", change)
    for text in ("zq", "a zq zqzq"):
        ids = chat.vocabulary.encode_text(text)
        assert not any(map(chat.vocabulary.is_control, ids)), text
        assert chat.vocabulary.decode(ids) == text
    for text in ("z~q", "~"):
        with pytest.raises(RequestError, match="no token for the character '~'"):
            chat.vocabulary.encode_text(text)


def test_entries_outside_the_byte_alphabet_are_themselves(tmp_path: Path) -> None:
    chat = loaded(tmp_path, "chatml", lambda v: v["model"]["vocab"].update({"你 好": 500}))
    assert chat.vocabulary.token_bytes[500] == "你 好".encode()


@pytest.mark.parametrize("seed", range(12))
def test_bytes_without_a_token_do_not_vanish(tmp_path: Path, seed: int) -> None:
    """The library leaves them out without a word; where the file names a token, it is taken."""
    dice = random.Random(seed)
    shutil.copytree(DATA / "chatml", tmp_path / "m")
    path = tmp_path / "m" / "tokenizer.json"
    description = json.loads(path.read_text())
    alphabet = byte_level_alphabet()
    missing = dice.sample(sorted(alphabet), dice.choice([1, 3, 60]))
    model = description["model"]
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    model["merges"] = [pair for pair in merges if not set("".join(pair)) & set(missing)]
    unknown = None
    if seed % 3 == 0:
        # One that is no control token, which is what typed text never becomes.
        others = {*missing, *(entry["content"] for entry in description["added_tokens"])}
        unknown = next(token for token in model["vocab"] if token not in others)
    model["unk_token"] = unknown
    for char in missing:
        del model["vocab"][char]
    path.write_text(json.dumps(description))
    vocabulary, _ = load_tokenizer_json(tmp_path / "m")
    library = tokenizers.Tokenizer.from_file(str(path))
    lost = {alphabet[char] for char in missing}
    num_refused = 0
    for _ in range(200):
        text = "".join(dice.choices("ab \n\tzé你😀Ωñ\x7f\x01,", k=dice.randrange(1, 8)))
        if unknown is None and lost & set(text.encode()):
            num_refused += 1
            with pytest.raises(RequestError, match="has no token for the character"):
                vocabulary.encode_text(text)
        else:
            expected = library.encode(text, add_special_tokens=False).ids
            assert vocabulary.encode_text(text) == expected
            if unknown is None:
                assert vocabulary.decode(expected) == text
    assert num_refused or unknown is not None or len(missing) < 60
