"""Places of a chat request in the words of the client's own request."""

import pytest

from halfbyte.errors import RequestError
from halfbyte.server.api.paths import Origin, Paths

PATHS = Paths(
    messages=[
        Origin("instructions"),
        Origin("input[0]", "input[0].content", ["input[0].content[0]", "input[0].content[2]"]),
        Origin("input[1]", calls=["input[1]", "input[3]"]),
    ],
    tools=["tools[1]", "tools[4]"],
    fields={"tool_call_id": "call_id", "image_url": "image_url", "name": "name", "text": ""},
    names={"max_tokens": "max_output_tokens", "response_format": "text.format"},
)


@pytest.mark.parametrize(
    "chat, own",
    [
        ("messages[0]", "instructions"),
        ("messages[0].content", "instructions"),
        ("messages[0].content[3]", "instructions[3]"),
        ("messages[1].content", "input[0].content"),
        ("messages[1].content[1]", "input[0].content[2]"),
        ("messages[1].content[1].image_url", "input[0].content[2].image_url"),
        ("messages[1].content[0].text", "input[0].content[0]"),
        ("messages[1].content[5]", "input[0].content[5]"),
        ("messages[1].tool_call_id", "input[0].call_id"),
        ("messages[2].tool_calls[1].function.name", "input[3].name"),
        ("messages[2].tool_calls[2]", "input[1]"),
        ("messages[3].content", "messages[3].content"),
        ("tools[1].function.name", "tools[4].name"),
        ("tools[0]", "tools[1]"),
        ("tools[2]", "tools[2]"),
        ("max_tokens", "max_output_tokens"),
        ("max_tokens: 5 is too many", "max_output_tokens: 5 is too many"),
        ("temperature", "temperature"),
        ("a sentence of messages[0] and tools[1]", "a sentence of instructions and tools[4]"),
    ],
)
def test_a_place_is_told_as_the_client_wrote_it(chat: str, own: str) -> None:
    assert PATHS.text(chat) == own


def test_an_error_keeps_what_is_no_place() -> None:
    found = PATHS.error(RequestError("messages[0]: no", param="tools[0]", code="c", status=413))
    assert (str(found), found.param, found.code, found.status) == (
        "instructions: no", "tools[1]", "c", 413,
    )  # fmt: skip
    assert PATHS.error(RequestError("no")).param is None
