"""In which form a chat answer goes out: OpenAI's, or what clients of Mistral's own API read.

The two differ in three habits (decision 0069). A client is told by what it sends, so that nobody
has to configure anything; `/mistral` before a path, or `--dialect`, says it outright.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Setting = Literal["auto", "openai", "mistral"]

# Requests to this path and below it are in Mistral's dialect; the rest of the path is the route.
MISTRAL_PREFIX = "/mistral"

# What only clients of Mistral's own API send.
_MISTRAL_NAMES = frozenset({"random_seed", "safe_prompt", "prompt_mode"})
# How Mistral's clients (Python, TypeScript) and the AI SDK's provider for it call themselves.
_MISTRAL_AGENTS = ("mistral-client-", "ai-sdk/mistral/")
# Programs over a bare HTTP client, langchain-mistralai among them, which names itself nowhere.
_BARE_AGENTS = ("python-httpx/",)


@dataclass(frozen=True, slots=True)
class Dialect:
    """The form that answers take; no token of an answer depends on it.

    whole_calls     a streamed tool call comes in one delta: these clients ask for the name in
                    each delta, or take each for a call of its own
    thought_parts   thoughts are parts of the content
    thought_field   thoughts are a field beside it
    closing_usage   the chunk that ends an answer carries the usage, asked for or not
    """

    whole_calls: bool = False
    thought_parts: bool = False
    thought_field: bool = True
    closing_usage: bool = False


OPENAI = Dialect()
MISTRAL = Dialect(whole_calls=True, thought_parts=True, thought_field=False, closing_usage=True)
# By OpenAI's rules a call may come whole and a last chunk may say more: no client is hurt by it.
BARE = Dialect(whole_calls=True, closing_usage=True)
# mistral-vibe over its own HTTP: one of its styles reads the parts only, another the field only,
# and both ask alike.
VIBE = Dialect(thought_parts=True)


def dialect_of(setting: Setting, path: str, user_agent: str, body: Mapping[str, Any]) -> Dialect:
    """The dialect in which a request is answered: the setting's, or the client's.

    path   as it was asked for, with `/mistral` if it began so
    body   as it was sent, before any name was translated
    """
    if path == MISTRAL_PREFIX or path.startswith(MISTRAL_PREFIX + "/"):
        return MISTRAL
    if setting != "auto":
        return MISTRAL if setting == "mistral" else OPENAI
    if any(agent in user_agent for agent in _MISTRAL_AGENTS):
        return MISTRAL
    options = body.get("stream_options")
    if _MISTRAL_NAMES & {name for name, value in body.items() if value is not None}:
        # litellm translates OpenAI's names into Mistral's and reads OpenAI's answers: what is
        # sent tells what is understood only together with who sends it.
        return BARE
    if user_agent.startswith(_BARE_AGENTS):
        if options is None:
            return BARE
        if isinstance(options, dict) and options.get("stream_tool_calls") is True:
            return VIBE
    return OPENAI
