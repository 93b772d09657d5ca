import json
import threading
import time
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given
from PIL import Image

from halfbyte.chat.mistral_format import MistralFormat
from halfbyte.chat.template_format import TemplateFormat
from halfbyte.chat.tokens import ChatFormat, load_chat
from halfbyte.errors import CheckpointError, RequestError

DATA = Path(__file__).parent.parent / "data" / "chat"
SETTINGS = '[MODEL_SETTINGS]{"reasoning_effort": "none"}[/MODEL_SETTINGS]'
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def shown(chat: ChatFormat, messages: list[dict[str, Any]], **options: Any) -> str:
    prompt = chat.encode(messages, **options)
    return chat.vocabulary.decode(prompt.token_ids, keep_control=True)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def test_mistral_conversation_has_the_published_layout(mistral: MistralFormat) -> None:
    call = {"id": "call_abcdefghij", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "developer", "content": "Be brief."},
        user("Hi"),
        {"role": "assistant", "content": None, "reasoning": "hm", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_abcdefghij", "content": "21"},
    ]
    assert shown(mistral, messages, tools=[TOOL]) == (
        "<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT]"
        '[AVAILABLE_TOOLS][{"type": "function", "function": {"name": "f", "description": "",'
        ' "parameters": {"type": "object"}}}][/AVAILABLE_TOOLS]'
        f"{SETTINGS}[INST]Hi[/INST]"
        '[THINK]hm[/THINK][TOOL_CALLS]f[ARGS]{"a": 1}</s>[TOOL_RESULTS]21[/TOOL_RESULTS]'
    )


def test_effort_reaches_the_settings_and_unknown_ones_are_refused(mistral: MistralFormat) -> None:
    assert '"reasoning_effort": "high"' in shown(mistral, [user("x")], reasoning_effort="high")
    with pytest.raises(RequestError, match="none, high") as caught:
        mistral.encode([user("x")], reasoning_effort="medium")
    assert caught.value.param == "reasoning_effort"


def other_settings(folder: Path, **changes: Any) -> MistralFormat:
    """The same vocabulary with other settings of its model; None takes one out."""
    tekken = json.loads((DATA / "tekken" / "tekken.json").read_text())
    settings = {**tekken["model_settings_builder"], **changes}
    tekken["model_settings_builder"] = {k: v for k, v in settings.items() if v is not None}
    (folder / "tekken.json").write_text(json.dumps(tekken))
    chat = load_chat(folder)
    assert isinstance(chat, MistralFormat)
    return chat


def test_a_model_without_thoughts_does_what_none_asks_for(tmp_path: Path) -> None:
    chat = other_settings(tmp_path, reasoning_effort=None)
    assert chat.reasoning_efforts == () and chat.default_effort is None
    assert shown(chat, [user("x")], reasoning_effort="none") == shown(chat, [user("x")])
    with pytest.raises(RequestError, match="not one this model knows: none"):
        chat.encode([user("x")], reasoning_effort="high")


def test_a_schema_is_shown_where_the_model_has_a_place_for_it(
    mistral: MistralFormat, tmp_path: Path
) -> None:
    schema = {"type": "object", "properties": {"colour": {"type": "string"}}}
    assert "colour" not in shown(mistral, [user("x")], json_schema=schema)
    chat = other_settings(tmp_path, json_schema={"type": "json_schema", "accepts_none": False})
    assert chat.shows_json_schema
    assert "colour" in shown(chat, [user("x")], json_schema=schema)
    assert shown(chat, [user("x")]) == shown(mistral, [user("x")])


def test_mistral_continues_an_answer(mistral: MistralFormat) -> None:
    messages = [user("Hi"), {"role": "assistant", "content": "Sure"}]
    assert shown(mistral, messages, continue_final=True).endswith("[INST]Hi[/INST]Sure")


def called(*ids: str, results: list[tuple[str, str]]) -> list[dict[str, Any]]:
    calls = [
        {"id": call_id, "function": {"name": f"f{n}", "arguments": "{}"}}
        for n, call_id in enumerate(ids)
    ]
    answers = [{"role": "tool", "tool_call_id": i, "content": text} for i, text in results]
    return [user("x"), {"role": "assistant", "tool_calls": calls}, *answers]


def test_results_follow_their_calls_whatever_ids_the_client_chose(mistral: MistralFormat) -> None:
    one, two = "call_8WxYAbcdefghijklmnopqrst", "toolu_01"
    ordered = called(one, two, results=[(one, "A"), (two, "B")])
    swapped = called(one, two, results=[(two, "B"), (one, "A")])
    assert mistral.encode(ordered) == mistral.encode(swapped)
    assert shown(mistral, ordered).endswith(
        "[TOOL_RESULTS]A[/TOOL_RESULTS][TOOL_RESULTS]B[/TOOL_RESULTS]"
    )
    # Clients that count their calls from 0 in every turn.
    again = [*called("call_0", results=[("call_0", "A")]), {"role": "assistant", "content": "ok"}]
    again += called("call_0", results=[("call_0", "B")])
    assert shown(mistral, again).endswith("[TOOL_RESULTS]B[/TOOL_RESULTS]")


@pytest.mark.parametrize(
    ("ids", "results"),
    [(("call_0", "call_0"), [("call_0", "A")]), (("call_0",), [("call_1", "A")])],
)
def test_wrong_ids_are_named_as_the_client_wrote_them(
    mistral: MistralFormat, ids: tuple[str, ...], results: list[tuple[str, str]]
) -> None:
    with pytest.raises(RequestError, match=r"id '?call_[01]\b"):
        mistral.encode(called(*ids, results=results))


@pytest.mark.parametrize("content", ["", None, [], [{"type": "text", "text": ""}]])
def test_empty_answers_in_a_history_say_nothing(mistral: MistralFormat, content: Any) -> None:
    empty = {"role": "assistant", "content": content}
    assert mistral.encode([user("x"), empty, user("y")]) == mistral.encode([user("x"), user("y")])
    assert shown(mistral, [user("x"), empty], continue_final=True).endswith("[INST]x[/INST]")
    thought = {**empty, "reasoning_content": "hm"}
    assert "[THINK]hm[/THINK]</s>" in shown(mistral, [user("x"), thought, user("y")])


def test_a_thought_sent_in_both_forms_is_written_once(mistral: MistralFormat) -> None:
    parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "y"}]
    answer = {"role": "assistant", "content": parts, "reasoning": "hm", "reasoning_content": "hm"}
    assert "[/INST][THINK]hm[/THINK]y</s>" in shown(mistral, [user("x"), answer, user("z")])


def test_who_is_to_speak_next_is_never_guessed(mistral: MistralFormat) -> None:
    with pytest.raises(RequestError, match="only an assistant's last message") as caught:
        mistral.encode([user("x")], continue_final=True)
    assert caught.value.param == "messages[0]"
    with pytest.raises(RequestError, match="continue_final_message") as caught:
        mistral.encode([user("x"), {"role": "assistant", "content": "y"}])
    assert caught.value.param == "messages[1]"


def test_no_typed_token_becomes_a_control_token(
    mistral: MistralFormat, chatml: TemplateFormat
) -> None:
    for chat in (mistral, chatml):
        clean = [i for i in chat.encode([user("x")]).token_ids if chat.vocabulary.is_control(i)]
        for name in chat.vocabulary.control:
            typed = chat.encode([user(f"a{name}b {name}")])
            control = [i for i in typed.token_ids if chat.vocabulary.is_control(i)]
            assert control == clean, name
            assert f"a{name}b {name}" in chat.vocabulary.decode(typed.token_ids, keep_control=True)
            plain = chat.encode_prompt(f"a{name}").token_ids
            assert not any(map(chat.vocabulary.is_control, plain[-len(name) :]))


def everywhere(text: str) -> dict[str, Any]:
    """A conversation with `text` in every string that a client may fill."""
    call = {"id": "call_1", "function": {"name": "f", "arguments": json.dumps({"a": text})}}
    function = {
        "name": "f",
        "description": text,
        "parameters": {
            "type": "object",
            "description": text,
            "properties": {text: {"type": "string", "enum": [text], "title": text}},
            "required": [text],
        },
    }
    return {
        "messages": [
            {"role": "system", "content": text},
            {"role": "developer", "content": [{"type": "text", "text": text}]},
            {"role": "user", "content": [{"type": "text", "text": text}] * 2, "name": text},
            {"role": "assistant", "content": text, "reasoning_content": text, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": text, "name": text},
            {"role": "assistant", "content": [{"type": "text", "text": text}], "reasoning": text},
            user(text),
            {"role": "assistant", "content": text},
        ],
        "tools": [{"type": "function", "function": function}],
        "continue_final": True,
    }


def test_no_token_typed_in_any_field_becomes_a_control_token(
    mistral: MistralFormat, chatml: TemplateFormat
) -> None:
    """System, user, thoughts, arguments, tool results, descriptions, schema keys, prefix."""
    for chat in (mistral, chatml):
        names = [*chat.vocabulary.control, "".join(chat.vocabulary.control)]
        is_control = chat.vocabulary.is_control
        conversation = everywhere("plain")
        clean = [i for i in chat.encode(**conversation).token_ids if is_control(i)]
        for name in names:
            for typed in (name, f" {name}", f"x{name}{name}y"):
                ids = chat.encode(**everywhere(typed)).token_ids
                assert [i for i in ids if is_control(i)] == clean, typed
                # Nothing was dropped to get there: the prefix ends the prompt as it was typed.
                end = chat.vocabulary.encode_text(typed)
                assert list(ids[-len(end) :]) == end or typed[0] == " "


def test_tool_and_call_names_that_are_control_tokens_are_refused(mistral: MistralFormat) -> None:
    for name in mistral.vocabulary.control:
        call = {"id": "a", "function": {"name": name, "arguments": "{}"}}
        tool = {"type": "function", "function": {"name": name, "parameters": {}}}
        called = [user("x"), {"role": "assistant", "tool_calls": [call]}]
        called.append({"role": "tool", "tool_call_id": "a", "content": "y"})
        for messages, tools in ((called, []), ([user("x")], [tool])):
            with pytest.raises(RequestError, match="name"):
                mistral.encode(messages, tools=tools)


# Fragments that could combine with each other or with what the template writes next.
_fragments = st.lists(
    st.sampled_from(["<|im_end|>", "<|im_", "end|>", "<", "|", "im_start|>", " ", "\n", "x"]),
    max_size=6,
).map("".join)


@given(_fragments, _fragments)
def test_fragments_never_combine_to_a_control_token(
    chatml: TemplateFormat, first: str, second: str
) -> None:
    prompt = chatml.encode([user(first), {"role": "assistant", "content": second}, user("x")])
    expected = chatml.encode([user("a"), {"role": "assistant", "content": "b"}, user("x")])
    is_control = chatml.vocabulary.is_control
    assert list(filter(is_control, prompt.token_ids)) == list(
        filter(is_control, expected.token_ids)
    )
    text = chatml.vocabulary.decode(prompt.token_ids, keep_control=True)
    assert f"user\n{first.strip()}<|im_end|>" in text


def test_template_sees_real_strings_and_trims_them(chatml: TemplateFormat) -> None:
    assert shown(chatml, [user("  Hello \n")]) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )


def test_template_ids_equal_the_tokenizers_own_on_harmless_text(chatml: TemplateFormat) -> None:
    import tokenizers

    path = Path(__file__).parent.parent / "data" / "chat" / "chatml" / "tokenizer.json"
    reference = tokenizers.Tokenizer.from_file(str(path))
    messages = [user("What is the capital of Italy?\n\n42 é")]
    ids = chatml.encode(messages).token_ids
    assert list(ids) == reference.encode(shown(chatml, messages)).ids


def test_template_continues_an_answer(chatml: TemplateFormat) -> None:
    messages = [user("Hi"), {"role": "assistant", "content": "Sure, <|im_end|>"}]
    text = shown(chatml, messages, continue_final=True)
    assert text.endswith("<|im_start|>assistant\nSure, <|im_end|>")
    assert chatml.encode(messages, continue_final=True).token_ids[-1] != 2


def test_text_model_refuses_images_and_efforts(chatml: TemplateFormat) -> None:
    image = [{"type": "image", "image": Image.new("RGB", (4, 4))}]
    with pytest.raises(RequestError, match="text only"):
        chatml.encode([{"role": "user", "content": image}])
    with pytest.raises(RequestError, match="reasoning_effort"):
        chatml.encode([user("x")], reasoning_effort="high")


def test_images_become_rows_of_tokens_at_their_place(mistral: MistralFormat) -> None:
    parts = [
        {"type": "text", "text": "What?"},
        {"type": "image", "image": Image.new("RGB", (100, 60))},
        {"type": "image", "image": Image.new("RGB", (28, 28))},
    ]
    prompt = mistral.encode([{"role": "user", "content": parts}])
    assert [(i.pixels.shape, i.num_tokens) for i in prompt.images] == [
        ((3, 84, 112), 15),
        ((3, 28, 28), 2),
    ]
    for image in prompt.images:
        run = prompt.token_ids[image.offset : image.offset + image.num_tokens]
        assert {10, 12, 13} >= set(run) and run[-1] == 13


@pytest.mark.parametrize("arguments", ["[]", "[", "1", '"x"'])
def test_arguments_that_are_no_object_are_refused(mistral: MistralFormat, arguments: str) -> None:
    call = {"id": "a", "function": {"name": "f", "arguments": arguments}}
    messages = [user("x"), {"role": "assistant", "tool_calls": [call]}]
    with pytest.raises(RequestError) as caught:
        mistral.encode(messages)
    assert caught.value.param == "messages[1].tool_calls[0].function.arguments"


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "assistant", "content": "x"}],
        [user("x"), {"role": "assistant", "content": "y"}, {"role": "system", "content": "z"}],
        [user("x"), {"role": "tool", "tool_call_id": "a", "content": "y"}],
    ],
)
def test_impossible_conversations_are_the_clients_error(
    mistral: MistralFormat, messages: list[dict[str, Any]]
) -> None:
    with pytest.raises(RequestError):
        mistral.encode(messages)


def test_directory_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tekken.json"):
        load_chat(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer.json cannot be read"):
        load_chat(tmp_path)
    (tmp_path / "tekken.json").write_text(json.dumps({"vocab": []}))
    with pytest.raises(CheckpointError, match=r"tekken.json"):
        load_chat(tmp_path)


def test_other_threads_run_while_a_long_prompt_is_encoded(chatml: TemplateFormat) -> None:
    """Running answers get no token in a thread that cannot run."""
    text = "a river " * 40_000
    ticks: list[float] = []
    done = threading.Event()

    def keep_ticking() -> None:
        while not done.wait(0.001):
            ticks.append(time.perf_counter())

    thread = threading.Thread(target=keep_ticking)
    thread.start()
    started = time.perf_counter()
    chatml.vocabulary.encode_text(text)
    ended = time.perf_counter()
    done.set()
    thread.join()
    during = [tick for tick in ticks if started < tick < ended]
    assert ended - started > 0.02
    assert len(during) > 5


@pytest.mark.parametrize(
    ("version", "has_tools", "has_ids"),
    [("v3", False, False), ("v7", False, False), ("v11", True, True), ("v13", True, False)],
)
def test_calls_are_those_of_the_tokenizers_version(
    version: str, has_tools: bool, has_ids: bool, tmp_path: Path
) -> None:
    source = json.loads((DATA / "tekken" / "tekken.json").read_text())
    source.pop("model_settings_builder", None)
    source["config"].pop("model_settings_builder", None)
    source["config"]["version"] = version
    (tmp_path / "tekken.json").write_text(json.dumps(source))
    control = load_chat(tmp_path).control
    assert control.has_tools is has_tools and (control.call_id is not None) is has_ids
