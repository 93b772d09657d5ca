"""Where templates stand, what they are given, and whom they let continue."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from halfbyte.chat.template_format import TemplateFormat, load_template_format
from halfbyte.errors import CheckpointError, RequestError

DATA = Path(__file__).parent.parent / "data" / "chat"
HELLO = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
SHOW = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"


def made(folder: Path, source: str | None, **config: Any) -> TemplateFormat:
    """The ChatML tokenizer with another template."""
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(DATA / "chatml" / name, folder)
    if config:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    if source is not None:
        (folder / "chat_template.jinja").write_text(source, encoding="utf-8")
    return load_template_format(folder)


def shown(chat: TemplateFormat, messages: list[dict[str, Any]], **options: Any) -> str:
    ids = chat.encode(messages, **options).token_ids
    return chat.vocabulary.decode(ids, keep_control=True)


def called(arguments: str) -> list[dict[str, Any]]:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    answer = {"role": "assistant", "content": None, "tool_calls": [call]}
    return [*HELLO, answer, {"role": "tool", "tool_call_id": "c1", "content": "ok"}]


NAMED = {"default": "plain", "tool_use": "with tools"}


@pytest.mark.parametrize(
    "value", [NAMED, [{"name": name, "template": text} for name, text in NAMED.items()]]
)
def test_named_templates_are_chosen_by_the_tools(tmp_path: Path, value: Any) -> None:
    chat = made(tmp_path, None, chat_template=value)
    assert shown(chat, HELLO) == "plain" and shown(chat, HELLO, tools=[TOOL]) == "with tools"
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": value}))
    chat = made(tmp_path, None, chat_template="the tokenizer's, which the processor's replaces")
    assert shown(chat, HELLO) == "plain" and shown(chat, HELLO, tools=[TOOL]) == "with tools"


def test_templates_in_files_of_their_own_win(tmp_path: Path) -> None:
    folder = tmp_path / "additional_chat_templates"
    folder.mkdir()
    (folder / "tool_use.jinja").write_text("with tools")
    chat = made(tmp_path, "\ufeffplain", chat_template="older")
    assert shown(chat, HELLO) == "plain" and shown(chat, HELLO, tools=[TOOL]) == "with tools"


def test_a_single_template_serves_tools_too(tmp_path: Path) -> None:
    chat = made(tmp_path, None, chat_template="{{ tools is none }}")
    assert shown(chat, HELLO) == "True" and shown(chat, HELLO, tools=[TOOL]) == "False"


@pytest.mark.parametrize(
    "value", [3, [], ["x"], [{"name": "default"}], {"default": 1}, {"tool_use": "x"}, [[]]]
)
def test_templates_of_other_shapes_are_refused(tmp_path: Path, value: Any) -> None:
    if value == []:
        chat = made(tmp_path, None, chat_template=value)
        with pytest.raises(RequestError, match="no chat template"):
            chat.encode(HELLO)
        return
    with pytest.raises(CheckpointError, match=r"chat.template"):
        made(tmp_path, None, chat_template=value)


def test_arguments_of_earlier_calls_are_objects(tmp_path: Path) -> None:
    source = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}{% set a = c.function.arguments %}"
        "{{ a | tojson }}{% for k, v in a | items %} {{ k }}={{ v }}{% endfor %}"
        "{% endfor %}{% endfor %}"
    )
    chat = made(tmp_path, source)
    assert shown(chat, called('{"city": "Köln", "n": [1, null]}')) == (
        '{"city": "Köln", "n": [1, null]} city=Köln n=[1, None]'
    )
    assert shown(chat, called(" ")) == "{}"
    for wrong in ("[]", "{} x", '{"a": NaN}', '{"a": 1e999}', '{"a": -Infinity}', '{"\\ud800": 1}'):
        with pytest.raises(RequestError, match=r"messages\[1\]\.tool_calls\[0\]\.function\.arg"):
            chat.encode(called(wrong))


@pytest.mark.parametrize("wrong", ['{"a": NaN}', '{"a": [1e999]}', '{"a": "\\udc00"}'])
def test_mistral_models_refuse_what_is_no_json_too(mistral: Any, wrong: str) -> None:
    with pytest.raises(RequestError, match="is not JSON"):
        mistral.encode(called(wrong))


def test_absent_content_is_absent(tmp_path: Path) -> None:
    source = "{% for m in messages %}{{ 'content' in m }} {{ m.content }};{% endfor %}"
    assert shown(made(tmp_path, source), called("{}")) == "True Hi;False ;True ok;"


def test_refusals_and_thoughts_of_the_history_are_taken(tmp_path: Path) -> None:
    source = SHOW + "{{ messages[1].reasoning_content }}/{{ messages[1].thinking }}"
    chat = made(tmp_path, source)
    parts = [
        {"type": "thinking", "thinking": "hm"},
        {"type": "text", "text": "x"},
        {"type": "refusal", "refusal": "no"},
    ]
    expected = "user:Hi;assistant:x\nno;user:Hi;hm/hm"
    assert shown(chat, [*HELLO, {"role": "assistant", "content": parts}, *HELLO]) == expected
    for name in ("reasoning", "reasoning_content"):
        answer = {"role": "assistant", "content": "x\nno", name: "hm"}
        assert shown(chat, [*HELLO, answer, *HELLO]) == expected


@pytest.mark.parametrize(
    ("source", "answer", "expected"),
    [
        (SHOW, "So, \n", "user:Hi;assistant:So, \n"),
        (SHOW.replace("m.content", "m.content | trim"), "So, \n", "user:Hi;assistant:So,"),
        (SHOW, "", "user:Hi;assistant:"),
        (SHOW.replace("m.content", "m.content | trim"), " ", "user:Hi;assistant:"),
        (SHOW, "<|im_end|>", "user:Hi;assistant:<|im_end|>"),
        (SHOW.replace("m.content", "m.content[:3]"), "a long answer", None),
        (SHOW.replace("m.content", "m.content[-9:]"), "a long answer", None),
        (SHOW.replace("m.content", "m.content | upper"), "answer", None),
        (SHOW + "{{ messages[-1].content }}", "answer", None),
        ("nothing of it", "answer", None),
        ("{{ messages[0].content }}", "Hi", None),
    ],
)
def test_an_answer_is_continued_where_the_template_writes_it_whole_and_once(
    tmp_path: Path, source: str, answer: str, expected: str | None
) -> None:
    chat = made(tmp_path, source)
    messages = [*HELLO, {"role": "assistant", "content": answer}]
    if expected is None:
        with pytest.raises(RequestError, match="cannot be continued") as caught:
            chat.encode(messages, continue_final=True)
        assert caught.value.param == "messages[1]"
        return
    assert shown(chat, messages, continue_final=True) == expected
    control = map(chat.vocabulary.is_control, chat.encode(messages, continue_final=True).token_ids)
    assert not any(control)


def test_half_a_surrogate_pair_is_the_clients_error(tmp_path: Path) -> None:
    chat = made(tmp_path, SHOW)
    for char in ("\ud800", "\udfff"):
        with pytest.raises(RequestError):
            chat.encode([{"role": "user", "content": char}])
        with pytest.raises(RequestError):
            chat.encode(
                [*HELLO, {"role": "assistant", "content": f"a{char} b"}], continue_final=True
            )


def test_flags_of_control_tokens_hold_in_conversations(tmp_path: Path) -> None:
    """lstrip, rstrip and single_word, as the tokenizers library reads them."""
    import tokenizers

    made(tmp_path, "x")
    path = tmp_path / "tokenizer.json"
    value = json.loads(path.read_text())
    source = " a <|im_end|> \n\t b<|im_end|>c <|im_start|>\u2003 x<|endoftext|> <|endoftext|>"
    for flags in range(64):
        for place, token in enumerate(value["added_tokens"]):
            token["lstrip"] = bool(flags >> place & 1)
            token["rstrip"] = bool(flags >> (place + 1) & 1)
            token["single_word"] = bool(flags >> (place + 3) & 1)
        path.write_text(json.dumps(value))
        (tmp_path / "chat_template.jinja").write_text(source)
        full = tokenizers.Tokenizer.from_file(str(path))
        got = list(load_template_format(tmp_path).encode(HELLO).token_ids)
        assert got == full.encode(source).ids, flags
