"""Random conversations and texts against the libraries that models were trained with.

The template path against transformers' `apply_chat_template`, plain text against tokenizers, the
Mistral path against mistral-common. A few dozen of each here, thousands in the tests marked slow.
"""

import json
import random
import warnings
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers import pre_tokenizers as pre
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from halfbyte.chat.detokenize import TextStream
from halfbyte.chat.mistral_format import MistralFormat, load_mistral_format
from halfbyte.chat.template_format import TemplateFormat, load_template_format
from halfbyte.errors import RequestError
from halfbyte.server.api import reading, wire

DATA = Path(__file__).parent.parent / "data" / "chat"
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|tool|>")
PLAIN = ("<tool_call>", "</tool_call>", "<think>", "</think>")

_END = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_LOOP = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
TEMPLATES = {
    "chatml": _LOOP + "{{ m.content }}<|im_end|>\n{% endfor %}" + _END,
    "trim": _LOOP + "{{ m.content | trim }}<|im_end|>\n{% endfor %}" + _END,
    "slices": "{% for m in messages %}<|im_start|>{{ m.content[-3:] }}{{ m.content | length }}"
    "{{ m.content.split('o')[0] }}{% endfor %}",
    "joined": "{% for m in messages %}{{ '<|im_' ~ 'start|>' + m['role'] + '\n' }}"
    "{% set c = m.content + '<|im_end|>' %}{{ c.strip() }}{{ '\n' }}{% endfor %}" + _END,
    "macro": "{% macro turn(m) %}{% generation %}<|im_start|>{{ m.role | upper }}"
    "{{ ': %s' % m.content }}<|im_end|>{% endgeneration %}{% endmacro %}"
    "{% set ns = namespace(text='') %}{% for m in messages %}"
    "{% set ns.text = ns.text ~ turn(m) %}{% endfor %}{{ ns.text }}" + _END,
    "tools": "{% if tools is not none %}<|tool|>{{ tools | tojson(indent=2) }}<|im_end|>{% endif %}"
    "{% if documents is not none %}documents{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if 'content' in m %}{{ m.content }}{% endif %}"
    "{% if m.reasoning_content %}<think>{{ m.thinking }}</think>{% endif %}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}"
    "{% for k, v in c.function.arguments | items %}{{ k }}={{ v | tojson }};{% endfor %}"
    "</tool_call>{% endfor %}<|im_end|>\n{% endfor %}" + _END,
    "first": "{{ bos_token }}{% if messages[0].role == 'system' %}{% set s = messages[0].content %}"
    "{% set rest = messages[1:] %}{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if loop.first and s %}{{ s ~ '\n\n' }}{% endif %}"
    "{{ '{}\n{}'.format(m.role, m.content) }}{{ eos_token }}{% endfor %}" + _END,
}
WORDS = (
    "hello",
    " world",
    "\n",
    "  ",
    "\t",
    "42",
    "é",
    "你好",
    "😀",
    "o",
    "x<",
    "|>",
    "'s",
    "\r\n",
)


def tokenizer(folder: Path, dice: random.Random) -> None:
    """A random byte-level tokenizer in a new folder, with no template."""
    folder.mkdir()
    made = Tokenizer(models.BPE(ignore_merges=dice.random() < 0.3))
    with_prefix = dice.random() < 0.3
    split = dice.choice([None, r"\p{N}{1,3}", r"\s+"])
    parts: list[Any] = [] if split is None else [pre.Split(Regex(split), "isolated")]
    parts.append(pre.ByteLevel(add_prefix_space=with_prefix, use_regex=split is None))
    made.pre_tokenizer = pre.Sequence(parts)
    if dice.random() < 0.3:
        made.normalizer = normalizers.NFC()
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=dice.choice([256, 300]),
        initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["hello world, hello model 4242 " * 3, "the other day"], trainer)
    strips = dice.random() < 0.4
    groups = [(SPECIALS, True), (PLAIN, False)]
    for names, special in dice.sample(groups, 2):
        tokens = [
            AddedToken(
                name,
                special=special,
                normalized=False,
                lstrip=strips and dice.random() < 0.3,
                rstrip=strips and dice.random() < 0.3,
                single_word=strips and dice.random() < 0.2,
            )
            for name in names
        ]
        (made.add_special_tokens if special else made.add_tokens)(tokens)
    if dice.random() < 0.3:
        bos = [("<|endoftext|>", made.token_to_id("<|endoftext|>"))]
        made.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=bos)
    made.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def text(dice: random.Random, *, plain: bool = True) -> str:
    pool = (*WORDS, *PLAIN) if plain else WORDS
    return "".join(dice.choice(pool) for _ in range(dice.randrange(1, 8)))


def conversation(dice: random.Random, *, calls: bool) -> list[dict[str, Any]]:
    """Turns in a legal order; typed control tokens are another test's business."""
    messages: list[dict[str, Any]] = []
    if dice.random() < 0.4:
        messages.append({"role": "system", "content": text(dice)})
    for _ in range(dice.randrange(1, 4)):
        messages.append({"role": "user", "content": text(dice)})
        answer: dict[str, Any] = {"role": "assistant", "content": text(dice)}
        if calls and dice.random() < 0.6:
            arguments: dict[str, Any] = {
                text(dice): dice.choice([text(dice), 1, 2.5, None, [text(dice)], {}])
            }
            function = {"name": "f", "arguments": arguments}
            answer["tool_calls"] = [{"id": "c12345678", "type": "function", "function": function}]
            if dice.random() < 0.5:
                del answer["content"]
            if dice.random() < 0.5:
                answer["reasoning_content"] = text(dice)
            result = {"role": "tool", "tool_call_id": "c12345678", "content": text(dice)}
            messages += [answer, result, {"role": "assistant", "content": text(dice)}]
        else:
            messages.append(answer)
    if dice.random() < 0.6 or not messages[-1]["content"].strip():
        # Of a blank answer under a trimming template, transformers cuts off the turn's beginning.
        messages.pop()
    return messages


def ours(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same as a client sends it: arguments are JSON text, null stands for absent content."""
    sent = []
    for message in messages:
        copy = {**message, "content": message.get("content")}
        if "tool_calls" in message:
            (call,) = message["tool_calls"]
            arguments = json.dumps(call["function"]["arguments"])
            copy["tool_calls"] = [{**call, "function": {"name": "f", "arguments": arguments}}]
        sent.append(copy)
    return sent


def compare_templates(folder: Path, seed: int) -> None:
    dice = random.Random(seed)
    tokenizer(folder, dice)
    name = dice.choice(sorted(TEMPLATES))
    (folder / "chat_template.jinja").write_text(TEMPLATES[name])
    chat = load_template_format(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    for _ in range(8):
        messages = conversation(dice, calls=name == "tools")
        if name == "slices" and messages[-1]["role"] == "assistant":
            messages.pop()  # no answer can be continued whose end alone is written
        tools = [{"type": "function", "function": {"name": "f", "description": text(dice)}}]
        options: dict[str, Any] = {"tools": tools if dice.random() < 0.5 else None}
        continues = messages[-1]["role"] == "assistant"
        try:
            expected = theirs.apply_chat_template(
                messages,
                return_dict=False,
                add_generation_prompt=not continues,
                continue_final_message=continues,
                **options,
            )
        except ValueError:  # the final message is not found
            with pytest.raises(RequestError, match="cannot be continued"):
                chat.encode(ours(messages), tools=options["tools"] or (), continue_final=True)
            continue
        sent = {"tools": options["tools"] or (), "continue_final": continues}
        got = chat.encode(ours(messages), **sent).token_ids
        assert list(got) == expected, (seed, name, messages)
    compare_texts(chat, Tokenizer.from_file(str(folder / "tokenizer.json")), dice)


def compare_texts(chat: TemplateFormat, full: Tokenizer, dice: random.Random) -> None:
    for _ in range(20):
        one = text(dice)
        ids = chat.vocabulary.encode_text(one)
        assert ids == full.encode(one, add_special_tokens=False).ids, one
        assert streamed(chat, ids) == chat.vocabulary.decode(ids)
        hostile = one + dice.choice(SPECIALS) + text(dice)
        typed = chat.vocabulary.encode_text(hostile)
        assert not any(map(chat.vocabulary.is_control, typed)), hostile


def streamed(chat: TemplateFormat | MistralFormat, ids: list[int]) -> str:
    stream = TextStream(chat.vocabulary)
    return "".join([*map(stream.feed, ids), stream.flush()])


@pytest.mark.parametrize("seed", range(12))
def test_templates_render_as_in_transformers(seed: int, tmp_path: Path) -> None:
    compare_templates(tmp_path / "t", seed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_templates_render_as_in_transformers_at_length(tmp_path: Path) -> None:
    for seed in range(1000, 1600):
        compare_templates(tmp_path / str(seed), seed)


def mistral_files() -> Iterator[Path]:
    for entry in files("mistral_common").joinpath("data").iterdir():
        if entry.name.startswith("tekken") and entry.name.endswith(".json"):
            yield Path(str(entry))


def compare_mistral(chat: MistralFormat, theirs: Any, dice: random.Random) -> None:
    messages = ours(conversation(dice, calls=True))
    for message in messages:
        message.pop("reasoning_content", None)
        if message["content"] is None:
            message.pop("content")
    continues = messages[-1]["role"] == "assistant"
    if continues:
        messages[-1]["prefix"] = True
    body: dict[str, Any] = {"model": "m", "messages": messages}
    if dice.random() < 0.5:
        function = {"name": "f", "description": text(dice), "parameters": {"type": "object"}}
        body["tools"] = [{"type": "function", "function": function}]
    request = reading.parse(wire.ChatRequest, body)
    plain = [message.model_dump(exclude_none=True) for message in request.messages]
    tools = [tool.model_dump(exclude_none=True) for tool in request.tools or ()]
    # Prefixes are Mistral's own field, which the OpenAI form of mistral-common does not know.
    said = [{k: v for k, v in message.items() if k != "prefix"} for message in messages]
    same = ChatCompletionRequest.from_openai(
        messages=said, tools=body.get("tools"), model="m", continue_final_message=continues
    )

    def encode() -> list[int]:
        continue_final = request.continues_final
        return list(chat.encode(plain, tools=tools, continue_final=continue_final).token_ids)

    try:
        expected = theirs.encode_chat_completion(same).tokens
    except MistralCommonException:
        # Formats of earlier versions have no place for a text beside a call.
        with pytest.raises(RequestError):
            encode()
    else:
        assert encode() == expected, messages


def compare_mistral_texts(chat: MistralFormat, dice: random.Random) -> None:
    for _ in range(10):
        one = text(dice) + dice.choice(["", "[INST]", "</s>", "[IMG]"]) + text(dice)
        ids = chat.vocabulary.encode_text(one)
        assert not any(map(chat.vocabulary.is_control, ids))
        assert chat.vocabulary.decode(ids) == one == streamed(chat, ids)


def test_mistral_conversations_are_those_of_mistral_common(mistral: MistralFormat) -> None:
    theirs = MistralTokenizer.from_file(str(DATA / "tekken" / "tekken.json"))
    dice = random.Random(0)
    for _ in range(40):
        compare_mistral(mistral, theirs, dice)
    compare_mistral_texts(mistral, dice)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_mistral_conversations_at_length() -> None:
    for path in mistral_files():
        chat, theirs = load_mistral_format(path), MistralTokenizer.from_file(str(path))
        dice = random.Random(1)
        for _ in range(1500):
            compare_mistral(chat, theirs, dice)
            compare_mistral_texts(chat, dice)
