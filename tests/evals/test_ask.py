"""What becomes of a server's answer, and how long it may be."""

import pytest

pytest.importorskip("inspect_ai", reason="extra 'eval' is not installed")

from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessageAssistant,
    ContentReasoning,
    ContentText,
    ModelOutput,
    ModelUsage,
)

from halfbyte.evals.running.ask import _with_output, max_tokens_for
from halfbyte.evals.types import Attempt, Text

BLANK = Attempt("pocket", "item", 2, 7, "0" * 8, "", "", "", 1, 1, 1, 0.5)


def output(usage: ModelUsage | None, stop: str = "stop") -> ModelOutput:
    content = [ContentReasoning(reasoning="so"), ContentText(text="A"), ContentText(text="B")]
    message = ChatMessageAssistant(content=content)
    choice = ChatCompletionChoice(message=message, stop_reason=stop)
    return ModelOutput(model="m", choices=[choice], usage=usage)


def test_an_answer_without_counts_of_tokens_has_none() -> None:
    found = _with_output(BLANK, output(None))
    assert (found.answer, found.reasoning, found.finish_reason) == ("AB", "so", "stop")
    assert (found.prompt_tokens, found.completion_tokens, found.reasoning_tokens) == (0, 0, 0)


@pytest.mark.parametrize("num_thoughts, counted", [(None, 0), (3, 3)])
def test_counts_of_tokens_are_the_servers(num_thoughts: int | None, counted: int) -> None:
    usage = ModelUsage(input_tokens=5, output_tokens=9, reasoning_tokens=num_thoughts)
    found = _with_output(BLANK, output(usage))
    assert (found.prompt_tokens, found.completion_tokens, found.reasoning_tokens) == (5, 9, counted)


@pytest.mark.parametrize("stop", ["max_tokens", "model_length"])
def test_an_answer_that_was_cut_ends_by_its_length(stop: str) -> None:
    assert _with_output(BLANK, output(None, stop)).finish_reason == "length"


def test_where_the_prompt_takes_all_a_few_tokens_are_asked_for() -> None:
    prompt = (Text("word " * 5000),)
    assert max_tokens_for(prompt, 4096, 1000) == 16
    assert max_tokens_for(prompt, 8, 1000) == 8
    assert max_tokens_for(prompt, 4096, None) == 4096
