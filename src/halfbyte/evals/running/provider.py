"""How answers of an OpenAI-compatible server are read, whatever form their message has.

Servers differ in where thoughts stand (`reasoning_content`, `reasoning`, thinking parts of the
content, as Mistral's own API has them) and in what an error looks like (some send it with status
200). inspect-ai's client carries the requests; this class reads what comes back, and guesses
nothing: a body without choices is a failed request, with the body's own words.
"""

import json
from typing import Any

from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessageAssistant,
    Content,
    ContentReasoning,
    ContentText,
    GenerateConfig,
    modelapi,
)
from inspect_ai.model._openai import as_stop_reason
from inspect_ai.model._providers.openai_compatible import OpenAICompatibleAPI

from halfbyte.evals.reasoning import SplitAnswer

PROVIDER = "halfbyte"  # the name under which inspect-ai finds this client

# The key of a message's metadata under which its tool calls stand: id, name and arguments' text.
TOOL_CALLS = "tool_calls"

# Where servers put thoughts that they send apart from the content.
_REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")


class ServerFaultError(Exception):
    """The server answered, but not with a completion; `status_code` if its body names one."""

    def __init__(self, message: str, status_code: int | None = None) -> None:
        super().__init__(message)
        self.provider_message = message
        self.status_code = status_code


@modelapi(name=PROVIDER)
class AnswerReader(OpenAICompatibleAPI):
    """inspect-ai's client for OpenAI-compatible servers, with our reading of messages."""

    def __init__(self, model_name: str, **settings: Any) -> None:
        super().__init__(model_name, service=PROVIDER, **settings)

    async def _generate_completion(self, request: dict[str, Any], config: GenerateConfig) -> Any:
        completion = await super()._generate_completion(request, config)
        check_completion(completion)
        for choice in completion.choices:
            # inspect-ai takes the content of every message for one text.
            # Not model_dump, which warns of contents that are no text.
            message = choice.message
            answer = read_message({**message.__dict__, **(message.model_extra or {})})
            choice.message.content = answer.text
            choice.message.reasoning_content = answer.reasoning
        return completion

    def chat_choices_from_completion(self, completion: Any, tools: Any) -> Any:
        """The choices as inspect-ai keeps them; text and thoughts are apart already."""
        return [_choice(completion, choice) for choice in completion.choices]


def _choice(completion: Any, choice: Any) -> ChatCompletionChoice:
    content: list[Content] = [ContentText(text=choice.message.content)]
    if choice.message.reasoning_content:
        content.insert(0, ContentReasoning(reasoning=choice.message.reasoning_content))
    message = ChatMessageAssistant(
        content=content,
        model=str(completion.model or ""),
        source="generate",
        # Not as inspect-ai's own calls, which keep arguments only as far as they are JSON.
        metadata={TOOL_CALLS: read_calls(choice.message.tool_calls)},
    )
    return ChatCompletionChoice(message=message, stop_reason=as_stop_reason(choice.finish_reason))


def check_completion(completion: Any) -> None:
    """Raise ServerFaultError unless a body holds a completion with at least one message."""
    error = getattr(completion, "error", None)
    choices = getattr(completion, "choices", None)
    if error:
        about = error if isinstance(error, dict) else {"message": error}
        said = str(about.get("message") or about)
        code = about.get("code", about.get("status"))
        status = int(code) if isinstance(code, int | str) and str(code).isdigit() else None
        raise ServerFaultError(f"the server sent an error with status 200: {said[:400]}", status)
    if not isinstance(choices, list) or not choices:
        shown = (
            completion if isinstance(completion, str) else getattr(completion, "model_extra", "")
        )
        raise ServerFaultError(f"the server's answer has no choices: {str(shown)[:300]}")
    if any(getattr(choice, "message", None) is None for choice in choices):
        raise ServerFaultError("the server's answer has a choice without a message")


def read_message(message: dict[str, Any]) -> SplitAnswer:
    """Text and thoughts of an assistant's message, from any of the forms in use.

    Content may be text, null, or a list of parts: text parts joined are the answer, thinking parts
    the thoughts. Thoughts that lie in a field of their own come first.
    """
    fields = (message.get(name) for name in _REASONING_FIELDS)
    thoughts = [next((text for field in fields if (text := _text(field))), "")]
    content = message.get("content")
    texts = []
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, dict) and part.get("type") in ("thinking", "reasoning"):
            thoughts.append(_text(part.get("thinking", part.get("reasoning", part.get("text")))))
        else:
            texts.append(_text(part))
    text = "".join(texts) or _text(message.get("refusal"))
    return SplitAnswer(text, "\n".join(filter(None, thoughts)))


def read_calls(calls: Any) -> list[tuple[str, str, str]]:
    """Id, name and text of the arguments of each tool call of a message.

    Arguments that a server sends as an object, against the protocol, are written as JSON.
    """
    found = []
    for number, call in enumerate(calls if isinstance(calls, list) else ()):
        function = getattr(call, "function", None)
        name = getattr(function, "name", None)
        if not isinstance(name, str):
            continue  # a tool of another kind than functions, of which none is offered
        given = getattr(function, "arguments", None)
        arguments = given if isinstance(given, str) else json.dumps(given)
        found.append((str(getattr(call, "id", None) or f"call{number:05d}"), name, arguments))
    return found


def _text(value: Any) -> str:
    """The text in a value: itself, that of a part, of a list of parts; "" if it has none."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "".join(_text(part) for part in value)
    if isinstance(value, dict):
        names = ("text", "thinking", "reasoning", "content", "refusal", "summary")
        return next((text for name in names if (text := _text(value.get(name)))), "")
    return ""
