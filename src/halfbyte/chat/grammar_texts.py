"""Grammars as texts: of schemas, patterns, choices and tool calls, in llguidance's own language."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import llguidance

from halfbyte.chat.prompt import ControlTokens
from halfbyte.chat.schema import (
    guided,
    object_schema,
)
from halfbyte.chat.tools import CALL_ID_CHARS
from halfbyte.errors import RequestError


def json_schema_grammar(schema: Mapping[str, Any], *, lenient: bool) -> str:
    """Write a grammar that permits exactly one JSON value of a schema.

    lenient   keywords that llguidance cannot express become warnings instead of errors
    """
    return f"start: %json {guided(schema, lenient=lenient)}\n"


def regex_grammar(regex: str) -> str:
    """Write a grammar for a text that matches the whole of a regex (Rust syntax, ASCII digits)."""
    return f"start: /{llguidance.regex_to_lark(regex, use_ascii='d')}/\n"


def choice_grammar(choices: Sequence[str]) -> str:
    """Write a grammar for one of some texts, as one terminal, which shares their beginnings."""
    return "start: CHOICE\nCHOICE: " + " | ".join(map(_quoted, choices)) + "\n"


def _quoted(text: str) -> str:
    """A text as Lark has it; DEL is the one character that JSON leaves and Lark refuses."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def tools_grammar(
    tools: Sequence[Mapping[str, Any]],
    control: ControlTokens,
    *,
    choice: str,
    parallel: bool,
    answer: str | None = None,
) -> str:
    """Write a grammar for text and tool calls, each call's arguments held to their schema.

    choice     "auto": text, calls, or text and then calls; "required": calls only; any other
               value is the name of the one function to call, once
    parallel   whether several calls may follow each other
    answer     a grammar of the kind above that replaces the free text of "auto"

    Raises RequestError for a model whose calls have another form, and for parameters that are no
    object's.
    """
    if not control.has_tools:
        raise RequestError("tools: this model's format has no tool calls", param="tools")
    chosen = [(number, tool["function"]) for number, tool in enumerate(tools)]
    if choice not in ("auto", "required"):
        chosen = [(number, function) for number, function in chosen if function["name"] == choice]
        parallel = False
    calls = "call+" if parallel else "call"
    if choice != "auto":
        start = f"start: {calls}"
    elif answer is None:
        start = f"start: TEXT? | TEXT? {calls}"
    else:
        start = f"start: answer | {calls}"
    rules = [start, "TEXT: /(.|\\n)+/"]
    if answer is not None:
        rules.append(answer.strip().replace("start:", "answer:", 1))
    names = " | ".join(f"tool_{number}" for number, _ in chosen)
    rules.append(f"call: <[{control.tool_calls}]> ({names})")
    between = f"<[{control.args}]>"
    if control.call_id is not None:
        rules.append(f"CALL_ID: /[a-zA-Z0-9]{{{CALL_ID_CHARS}}}/")
        between = f"<[{control.call_id}]> CALL_ID {between}"
    for number, function in chosen:
        schema = object_schema(function.get("parameters"), f"tools[{number}].function.parameters")
        held = guided(schema, lenient=not function.get("strict"))
        rules.append(f"tool_{number}: {_quoted(function['name'])} {between} %json {held}")
    return "\n".join(rules) + "\n"
