"""What only trained weights can show: thoughts, tools, schemas, pictures, budgets, long documents.

Pocket, the repository's own small model, is served once, and the engine is loaded with other
settings beside it. A retrained model must pass too: shapes are held exactly, right answers by
majorities of kinds that it masters.
"""

import base64
import gc
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import jsonschema
import openai
import pytest
from pocket.evaluate import answer_of, messages_of, prompt_of
from pocket.grade import Answer, is_right
from pocket.items import Item, Turn
from pocket.mixture import item
from pocket.recall import recall
from pocket.tools import NO_TOOL

from engine_driver import assert_same, load, request, run
from halfbyte.chat.mistral_format import load_mistral_format
from halfbyte.child import served
from halfbyte.cli.main import main
from halfbyte.engine.generate import Generated
from halfbyte.engine.request import SamplingParams
from halfbyte.evals.records import read_run

MODEL = Path(__file__).resolve().parents[2] / "pocket" / "model"
HEAD = MODEL.parent / "head"
MAX_TOKENS = 300


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """The official client of a server in a process of its own."""
    log = tmp_path_factory.mktemp("served") / "server.log"
    flags = ("--max-model-len", 8192, "--kv-cache-tokens", 32768, "--served-model-name", "pocket")
    with (
        served(MODEL, *flags, log=log, start_limit_s=55) as server,
        openai.OpenAI(api_key="none", base_url=f"{server.url}/v1", max_retries=0) as found,
    ):
        yield found


@cache
def items(kind: str, effort: str | None = None, count: int = 6) -> tuple[Item, ...]:
    """The first held-out items of a kind, of one effort if it is named."""
    found = (item(kind, number, "test") for number in range(200))
    return tuple(one for one in found if effort in (None, one.effort))[:count]


def data_uri(picture: Any) -> str:
    stream = io.BytesIO()
    picture.save(stream, format="PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def asked(found: Item, **more: Any) -> dict[str, Any]:
    """The request for an item's last answer, greedy."""
    messages = messages_of(found)[:-1]
    for message in messages:
        if isinstance(message["content"], list):
            message["content"] = [
                {"type": "image_url", "image_url": {"url": data_uri(part["image"])}}
                if part["type"] == "image"
                else part
                for part in message["content"]
            ]
        if not message.get("tool_calls"):
            message.pop("tool_calls", None)
    fields: dict[str, Any] = {"reasoning_effort": found.effort, **more}
    if found.tools:
        fields["tools"] = list(found.tools)
    return {
        "model": "pocket", "messages": messages, "temperature": 0, "max_tokens": MAX_TOKENS,
        **fields,
    }  # fmt: skip


def said(client: openai.OpenAI, found: Item, **more: Any) -> tuple[Answer, Any]:
    """The parts of an answer, and the whole response."""
    response = client.chat.completions.create(**asked(found, **more))
    message = response.choices[0].message
    calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]
    thought = getattr(message, "reasoning_content", None) or ""
    return Answer(message.content or "", thought, tuple(calls)), response


def streamed(client: openai.OpenAI, found: Item, **more: Any) -> Answer:
    """The same, put together from a stream."""
    content = thought = ""
    calls: list[list[str]] = []
    for chunk in client.chat.completions.create(**asked(found, stream=True, **more)):
        for choice in chunk.choices:
            content += choice.delta.content or ""
            thought += getattr(choice.delta, "reasoning_content", None) or ""
            for part in choice.delta.tool_calls or ():
                if part.index == len(calls):
                    calls.append([part.function.name, ""])
                calls[part.index][1] += part.function.arguments or ""
    return Answer(content, thought, tuple((name, text) for name, text in calls))


def num_right(found: Sequence[Item], answers: Sequence[Answer]) -> int:
    return sum(is_right(one, answer) for one, answer in zip(found, answers, strict=True))


def test_a_thought_stands_apart_from_the_answer_and_makes_it_right(client: openai.OpenAI) -> None:
    chosen = items("integers", "high")
    answers = [said(client, one) for one in chosen]
    for answer, response in answers:
        assert answer.thought and "boxed" not in answer.thought
        assert answer.content.startswith("\\boxed{") and "[" not in answer.content
        assert response.usage.completion_tokens_details.reasoning_tokens > 10
    bare = [said(client, one, reasoning_effort="none") for one in chosen]
    assert not any(answer.thought for answer, _ in bare)
    tokens = [[r.usage.completion_tokens for _, r in these] for these in (answers, bare)]
    assert sum(tokens[0]) > 3 * sum(tokens[1])
    right = [num_right(chosen, [answer for answer, _ in these]) for these in (answers, bare)]
    assert right[0] >= len(chosen) - 1 and right[0] > right[1]


@pytest.mark.parametrize("kind", ["integers", "tools", "json", "hard", "languages"])
def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI, kind: str) -> None:
    chosen = items(kind, count=2)
    whole = [said(client, one)[0] for one in chosen]
    assert [streamed(client, one) for one in chosen] == whole


def test_a_thought_ends_where_its_budget_does_and_the_answer_follows(
    client: openai.OpenAI,
) -> None:
    for one in items("hard", "high", 3):
        free, _ = said(client, one)
        answer, response = said(client, one, extra_body={"max_reasoning_tokens": 6})
        # The two marks around the thought are counted with it.
        assert 0 < response.usage.completion_tokens_details.reasoning_tokens <= 6 + 2
        assert answer.thought and free.thought.startswith(answer.thought)
        assert answer.content.startswith("Answer: ")
        assert response.choices[0].finish_reason == "stop"


def tool_items(num_calls: int, count: int) -> list[Item]:
    """Items that ask for so many calls, or for none because no tool fits."""
    found = []
    for number in range(300):
        one = item("tools", number, "test")
        calls = one.gold.get("calls")
        is_unfit = one.gold.get("text") == NO_TOOL
        if (len(calls) == num_calls) if calls else (num_calls == 0 and is_unfit):
            found.append(one)
    return found[:count]


def valid_calls(one: Item, answer: Answer) -> None:
    """Every call names a tool of the request, and its arguments are by its schema."""
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in one.tools}
    for name, arguments in answer.calls:
        jsonschema.validate(json.loads(arguments), schemas[name])


@pytest.mark.parametrize(("num_calls", "count"), [(1, 5), (2, 4), (0, 4)])
def test_the_model_chooses_one_tool_or_two_or_none(
    client: openai.OpenAI, num_calls: int, count: int
) -> None:
    chosen = tool_items(num_calls, count)
    assert len(chosen) == count
    answers = []
    for one in chosen:
        answer, response = said(client, one, tool_choice="auto")
        answers.append(answer)
        valid_calls(one, answer)
        wanted = "tool_calls" if answer.calls else "stop"
        assert response.choices[0].finish_reason == wanted
    assert num_right(chosen, answers) >= count - 1
    assert sum(len(answer.calls) == num_calls for answer in answers) >= count - 1


def test_a_choice_of_tools_is_kept_where_the_model_would_choose_otherwise(
    client: openai.OpenAI,
) -> None:
    # It would call none of them.
    for one in tool_items(0, 2):
        answer, response = said(client, one, tool_choice="required")
        assert answer.calls and response.choices[0].finish_reason == "tool_calls"
        valid_calls(one, answer)
        name = one.tools[-1]["function"]["name"]
        named = {"type": "function", "function": {"name": name}}
        answer, _ = said(client, one, tool_choice=named)
        assert [found for found, _ in answer.calls] == [name]
        valid_calls(one, answer)
    # It would call one; parallel calls are held to one where the request says so.
    for one in tool_items(2, 2):
        assert not said(client, one, tool_choice="none")[0].calls
        alone, _ = said(client, one, parallel_tool_calls=False)
        assert len(alone.calls) == 1
        both, _ = said(client, one)
        assert alone.calls[0] == both.calls[0]


def test_a_result_that_a_tool_gave_is_in_the_answer(client: openai.OpenAI) -> None:
    rounds = []
    for one in tool_items(1, 12):
        (call,) = one.gold["calls"]
        if call[0] in ("get_price", "order_item", "book_train", "book_hotel"):
            rounds.append(one)
    assert len(rounds) >= 2
    told = 0
    for one in rounds[:3]:
        calls = one.turns[-1].calls
        answered = (*one.turns, Turn("tool", json.dumps({"amount": 437})), Turn("assistant"))
        follow = Item(one.kind, answered, one.effort, tools=one.tools)
        answer, response = said(client, follow)
        assert calls and not answer.calls and response.choices[0].finish_reason == "stop"
        told += "437" in answer.content
    assert told >= min(3, len(rounds)) - 1


@pytest.mark.parametrize("effort", ["high", "none"])
def test_an_answer_by_schema_follows_the_thought(client: openai.OpenAI, effort: str) -> None:
    chosen = [one for one in items("json", count=24) if one.schema is not None][:5]
    answers = []
    for one in chosen:
        form = {"name": "data", "schema": one.schema, "strict": True}
        answer, response = said(
            client, one, reasoning_effort=effort,
            response_format={"type": "json_schema", "json_schema": form},
        )  # fmt: skip
        assert response.choices[0].finish_reason == "stop"
        assert bool(answer.thought) == (effort == "high")
        jsonschema.validate(json.loads(answer.content), one.schema)
        answers.append(answer)
    assert num_right(chosen, answers) >= len(chosen) - 1


def test_a_schema_holds_where_the_model_would_write_prose(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"answer": {"enum": ["yes", "no"]}, "count": {"type": "integer"}},
        "required": ["answer", "count"],
        "additionalProperties": False,
    }
    form = {"name": "x", "schema": schema, "strict": True}
    one = items("languages", count=1)[0]
    free, _ = said(client, one)
    held, _ = said(client, one, response_format={"type": "json_schema", "json_schema": form})
    assert not free.content.startswith("{")
    jsonschema.validate(json.loads(held.content), schema)


def test_a_system_prompt_changes_the_answer(client: openai.OpenAI) -> None:
    chosen = items("system")
    answers = [said(client, one)[0] for one in chosen]
    assert num_right(chosen, answers) >= len(chosen) - 1
    plain = [Item(one.kind, one.turns, one.effort, gold=one.gold) for one in chosen]
    unasked = [said(client, one)[0].content for one in plain]
    assert sum(a.content != b for a, b in zip(answers, unasked, strict=True)) >= 3


def picture_items() -> list[Item]:
    """One picture, several, and a question that stands in the picture."""
    found = [item("images", number, "test") for number in range(60)]
    several = [one for one in found if len(one.turns[0].images) > 1]
    inside = [one for one in found if one.gold["scene"] == "inside"]
    alone = [one for one in found if one not in several and one not in inside]
    assert several and inside
    return [*alone[:6], *several[:3], *inside[:3]]


def test_pictures_are_answered_alone_several_and_with_the_question_inside(
    client: openai.OpenAI,
) -> None:
    chosen = picture_items()
    answers = []
    for one in chosen:
        answer, response = said(client, one, reasoning_effort="high")
        letters = "ABCDEFGHIJ"[: one.gold["options"]]
        assert answer.content.removeprefix("Answer: ") in letters, answer
        assert response.choices[0].finish_reason == "stop"
        answers.append(answer)
    # Guessing gives one in five.
    assert num_right(chosen, answers) >= len(chosen) * 0.5
    thoughts = [answer.thought for answer in answers]
    assert len(set(thoughts)) > len(chosen) // 2, "the pictures are not looked at"


def test_a_prefix_with_a_picture_is_found_again_but_not_for_another_picture(
    client: openai.OpenAI,
) -> None:
    # The question stands in the picture: of two of one size, only what is drawn differs.
    of_size: dict[Any, list[Item]] = {}
    for number in range(200):
        one = item("images", number, "test")
        if one.gold["scene"] == "inside":
            of_size.setdefault(one.turns[0].images[0].size, []).append(one)
    first, other = next(found for found in of_size.values() if len(found) > 1)[:2]
    answers, cached = [], []
    for one in (first, first, other, first):
        answer, response = said(client, one, reasoning_effort="high")
        answers.append(answer)
        cached.append(response.usage.prompt_tokens_details.cached_tokens)
    assert answers[0] == answers[1] == answers[3] != answers[2]
    assert cached[1] == cached[3] > cached[2]


def test_ten_requests_at_once_are_answered_as_alone(client: openai.OpenAI) -> None:
    kinds = ("integers", "tools", "json", "knowledge", "programs")
    chosen = [one for kind in kinds for one in items(kind, count=2)]
    alone = [said(client, one)[0] for one in chosen]
    with ThreadPoolExecutor(len(chosen)) as pool:
        together = list(pool.map(lambda one: said(client, one)[0], chosen))
    assert together == alone


@pytest.fixture
def collected() -> Iterator[None]:
    """Leftovers are collected while their warnings are filtered."""
    yield
    gc.collect()


# Both are inspect-ai's affair: a deprecated argument, and a stream left to the collector.
@pytest.mark.filterwarnings("ignore:The 'initial' parameter:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.timeout(120)  # imports inspect-ai: over ten seconds on a busy machine
def test_the_suite_is_carried_by_the_runner_of_every_benchmark(
    client: openai.OpenAI, tmp_path: Path, collected: None
) -> None:
    pytest.importorskip("inspect_ai")
    kinds = ["pocket_hard", "pocket_programs", "pocket_images"]
    options = ["--suite", *kinds, "--items", "4", "--seed", "3", "--out", str(tmp_path / "run")]
    assert main(["evaluate", str(client.base_url), *options]) == 0
    found = read_run(tmp_path / "run")
    assert list(found.benchmarks) == kinds
    for result in found.benchmarks.values():
        assert (result.status, result.items, result.full_items) == ("complete", 4, 4)
        assert result.provenance["revision"] == "generated, seed 3"
    # Programs are right only with the effort that their kind has.
    assert (found.benchmarks["pocket_programs"].score or 0) >= 0.75
    assert "effort none" in " ".join(found.benchmarks["pocket_programs"].notes)
    assert found.settings["temperature"] == 0.0 and found.settings["item_seed"] == 3


CHAT = load_mistral_format(MODEL / "tekken.json")
GREEDY = SamplingParams(temperature=0.0, max_tokens=48, logprobs=2)


@cache
def mixed_items() -> dict[str, Item]:
    """Thoughts, calls, JSON, a program, pictures, and documents beyond the unscaled positions."""
    kinds = ("integers", "tools", "json", "programs")
    found = {kind: items(kind, count=1)[0] for kind in kinds}
    pictures = picture_items()
    found |= {"picture": pictures[0], "pictures": pictures[6], "inside": pictures[9]}
    found["recall"] = recall(Random(7), "test", num_tokens=600, num_questions=1)
    found["long"] = recall(Random(8), "test", num_tokens=2300, num_questions=1)
    return found


def answers_of(*left_out: str, **options: Any) -> dict[str, Generated]:
    """The items' answers by an engine with these settings, all at once."""
    limits: dict[str, Any] = {
        "max_model_len": 4096,
        "kv_cache_tokens": 16384,
        "max_sequences": 16,
    }
    with closing(load(MODEL, **limits, **options)) as engine:
        chosen = {name: one for name, one in mixed_items().items() if name not in left_out}
        prompts = {name: prompt_of(one, CHAT) for name, one in chosen.items()}
        return run(
            engine,
            [request(name, ids, GREEDY, images=found) for name, (ids, found) in prompts.items()],
        )


@pytest.fixture(scope="module")
def plain() -> Mapping[str, Generated]:
    return answers_of(max_batch_tokens=4096, prefix_cache=False)


# Seconds by itself; processes that wait for each other on a busy machine take many times as long.
@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("options", "left_out"),
    [
        ({"max_batch_tokens": 96}, ()),
        ({"speculative": "ngram", "adaptive_speculation": False}, ("long",)),
        ({"speculative": str(HEAD), "adaptive_speculation": False}, ("long", "recall")),
        ({"tensor_parallel_size": 2}, ("long", "recall")),
    ],
    ids=["small chunks", "speculation", "speculation with its head", "two ranks"],
)
def test_answers_do_not_depend_on_how_they_are_computed(
    options: dict[str, Any], left_out: Sequence[str], plain: Mapping[str, Generated]
) -> None:
    found = answers_of(*left_out, **options)
    assert found.keys() == plain.keys() - set(left_out)
    for name, answer in found.items():
        assert_same(answer, plain[name])


@pytest.mark.timeout(180)
def test_what_is_recalled_from_long_documents_stands_in_them(
    plain: Mapping[str, Generated],
) -> None:
    for name in ("recall", "long"):
        one = mixed_items()[name]
        answer = answer_of(plain[name].token_ids, one, CHAT)
        (document,) = (turn.content for turn in one.turns if turn.role == "user")
        assert answer.content and answer.content.strip() in document
    assert len(prompt_of(mixed_items()["long"], CHAT)[0]) > 2048
