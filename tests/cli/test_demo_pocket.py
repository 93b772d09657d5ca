"""The demo's second half: it is left out where there is no checkout, and says what it finds."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from halfbyte.cli import demo_pocket as half
from halfbyte.cli.demo_tools import Narrator
from halfbyte.errors import UnsupportedError


def test_a_checkout_has_the_model_and_what_makes_its_items() -> None:
    pocket = half.find_pocket()
    assert pocket is not None and (pocket.model / "tekken.json").is_file()
    assert pocket.module("mixture").GRADED


def test_without_a_checkout_the_second_half_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> Any:
        raise UnsupportedError("no pocket/")

    monkeypatch.setattr(half, "generator", absent)
    assert half.find_pocket() is None


def test_a_generator_without_its_model_is_no_second_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(half, "generator", lambda: SimpleNamespace(__file__=str(tmp_path / "x.py")))
    assert half.find_pocket() is None


class Scripted:
    """A client that answers every request by its last message; keeps the requests."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.chat = SimpleNamespace(completions=SimpleNamespace(create=self.create))

    def create(self, **request: Any) -> Any:
        self.requests.append(request)
        call = SimpleNamespace(
            id="000000001", function=SimpleNamespace(name="get_price", arguments='{"item": "pen"}')
        )
        is_first = "tools" in request and request["messages"][-1] == request["messages"][0]
        message = SimpleNamespace(
            content=None if is_first else "It says so.",
            reasoning_content="I think." if request["reasoning_effort"] == "high" else None,
            tool_calls=[call] if is_first else None,
        )
        return SimpleNamespace(choices=[SimpleNamespace(message=message)])


def test_it_asks_about_a_picture_for_a_thought_through_a_tool_and_by_a_schema(
    tmp_path: Path,
) -> None:
    pocket = half.find_pocket()
    assert pocket is not None
    client, narrator = Scripted(), Narrator()
    asker = half.Asker(client, "pocket", pocket.module("mixture"), narrator)
    answers = half.four_questions(asker, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    picture, thought, called, after, schema = client.requests
    assert picture["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png")
    assert thought["reasoning_effort"] == "high"
    assert called["tools"] == after["tools"]
    assert after["messages"][-1] == {
        "role": "tool", "tool_call_id": "000000001", "content": '{"amount": 437}',
    }  # fmt: skip
    assert schema["response_format"]["json_schema"]["strict"] is True
    assert {request["temperature"] for request in client.requests} == {0}
    told = "\n".join(narrator.lines)
    assert "(thinks) I think." in told and '(calls) get_price({"item": "pen"})' in told
    assert [bool(answer["right"]) for answer in answers] == [True, True, False, False]
    json.dumps(answers)
