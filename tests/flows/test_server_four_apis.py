"""The four APIs over the real engine: one conversation, the same tokens, streamed or whole."""

from pathlib import Path
from typing import Any

import pytest

from flows.stand import ARGS, CALLS, END_THINK, EOS, THINK, standing, write_model
from server.conversations import (
    CHAT,
    Answer,
    Conversation,
    Part,
    Turn,
    Use,
    asked,
    read_stream,
    read_whole,
)

TEXT = "/v1/completions"
NUM_CONTROL = 64
TOOL_LOOP = Conversation(
    "Be kind.",
    (
        Turn(
            (Part("What is this?"), Part(picture=1)),
            "It is red.",
            "I look it up.",
            (
                Use("abcdefghi", "g.h", {"a": 1}, (Part("one"), Part(picture=0))),
                Use("ABCDEFGHI", "f", {"b": "é"}, (Part("two"),)),
            ),
        ),
    ),
    (),
)
PLAIN = Conversation(None, (Turn((Part("Hi"),), None, "Hello", ()),), (Part("And?"),))
FORCED = Answer("hm", "See. ", (("g.h", '{"a": 1}'), ("f", '{"a": 23}')))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("seeing")
    write_model(path, vision=True)
    return path


async def answers(stand: Any, conversation: Conversation, **options: Any) -> set[Answer]:
    """What the three APIs say, streamed and whole."""
    found = set()
    for path, body in asked(conversation).items():
        body = {"model": "tiny", **body, **options}
        whole = await stand.http.post(path, json=body)
        assert whole.status_code == 200, whole.text
        found.add(read_whole(path, whole.json()))
        streamed = await stand.http.post(path, json={**body, "stream": True})
        found.add(read_stream(path, streamed.text))
    return found


@pytest.mark.parametrize("conversation", [TOOL_LOOP, PLAIN], ids=["tools", "plain"])
async def test_a_model_left_to_itself_says_the_same_everywhere(
    directory: Path, conversation: Conversation
) -> None:
    """Greedy, without a cache, so that each run computes the same numbers."""
    async with standing(directory, prefix_cache=False) as stand:
        (answer,) = await answers(stand, conversation, temperature=0)
        assert answer.thought or answer.text or answer.calls


async def test_thoughts_and_calls_come_over_each_api(directory: Path) -> None:
    async with standing(directory) as stand:
        stand.force(*FORCED.tokens(THINK, END_THINK, CALLS, ARGS), EOS)
        assert await answers(stand, TOOL_LOOP) == {FORCED}


async def test_plain_continuations_of_the_prompt_have_the_same_tokens(directory: Path) -> None:
    async with standing(directory, prefix_cache=False) as stand:
        body = asked(PLAIN)[CHAT] | {"model": "tiny", "temperature": 0, "return_token_ids": True}
        del body["tools"]
        # Answers have no control tokens, while plain continuations may say anything.
        bias = {str(token_id): -100 for token_id in range(NUM_CONTROL) if token_id != EOS}
        body |= {"reasoning_effort": "none", "max_tokens": 20, "logit_bias": bias}
        chat = (await stand.http.post(CHAT, json=body)).json()
        told = chat["choices"][0]["token_ids"]
        assert len(told) == chat["usage"]["completion_tokens"]
        plain = {"model": "tiny", "prompt": chat["prompt_token_ids"], "max_tokens": 20}
        plain |= {"temperature": 0, "return_token_ids": True, "logit_bias": bias}
        whole = (await stand.http.post(TEXT, json=plain)).json()["choices"][0]
        assert whole["token_ids"] == told
        assert whole["text"] == chat["choices"][0]["message"]["content"]
        streamed = await stand.http.post(TEXT, json={**plain, "stream": True})
        assert (read_stream(TEXT, streamed.text).text or "") == whole["text"]
