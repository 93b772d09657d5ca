"""What an answer is held to: tools, schemas, efforts, and what masks are made of."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from halfbyte.chat import grammar_texts
from halfbyte.chat.grammar_masks import CheckedGrammar
from halfbyte.chat.mask_plan import Beginning, MaskPlan
from halfbyte.chat.schema import HeldSchema
from halfbyte.errors import RequestError
from halfbyte.server.api import wire
from halfbyte.server.api.preparer import Preparer

# Efforts by how much they ask for; other names are nobody's.
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


@dataclass(frozen=True, slots=True)
class Rules:
    """What holds an answer: a checked grammar, and the tools that may be called.

    warnings   what of the request's schemas is not held
    """

    grammar: CheckedGrammar | None = None
    warnings: tuple[str, ...] = ()
    tool_names: frozenset[str] = frozenset()


def settle_effort(preparer: Preparer, asked: str | None) -> tuple[str | None, tuple[str, ...]]:
    """The reasoning effort that is used for the one asked for, and warnings about it.

    The nearest that the model knows, of two as near the higher. A model without efforts does what
    it always does. Raises RequestError for a name that is no effort, and with `strict_effort` for
    each that the model does not know.
    """
    known = preparer.chat.reasoning_efforts
    if asked is None or asked in known or (asked == "none" and not known):
        return asked, ()
    names = ", ".join(known) or "none"
    if preparer.config.strict_effort or asked not in _EFFORTS:
        raise RequestError(
            f"reasoning_effort {asked!r} is not one this model knows: {names}",
            param="reasoning_effort",
            code="unsupported_value",
        )
    if not known:
        return None, (f"reasoning_effort {asked}: this model has no efforts",)
    rank = _EFFORTS.index(asked)
    ranked = [effort for effort in known if effort in _EFFORTS]
    if not ranked:
        return None, (f"reasoning_effort {asked}: this model knows {names}; its default is taken",)

    def distance(effort: str) -> tuple[int, int]:
        return abs(_EFFORTS.index(effort) - rank), -_EFFORTS.index(effort)

    nearest = min(ranked, key=distance)
    return nearest, (f"reasoning_effort {asked} is taken as {nearest}; this model knows {names}",)


def may_think(preparer: Preparer, request: wire.ChatRequest) -> bool:
    """Whether the answer may hold a thought: the effort says so, where the model knows efforts."""
    chat = preparer.chat
    effort = request.reasoning_effort or chat.default_effort
    thinking = chat.control.has_thinking and (not chat.reasoning_efforts or effort != "none")
    if request.max_reasoning_tokens is not None and not chat.control.has_thinking:
        raise RequestError(
            "max_reasoning_tokens: this model has no thoughts",
            param="max_reasoning_tokens",
            code="unsupported_parameter",
        )
    return thinking


def _tool_choice(preparer: Preparer, request: wire.ChatRequest) -> tuple[str, list[wire.Tool]]:
    """ "none", "auto", "required" or the name of one tool, and the tools that may be called."""
    tools = list(request.tools or ())
    choice = request.tool_choice
    if choice is None:
        choice = "auto" if tools else "none"
    if choice in ("none", "auto") and not tools:
        return "none", []
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise RequestError("tools: two tools have the same name", param="tools")
    if isinstance(choice, wire.NamedTool):
        _check_named(choice.function.name, names)
        mode = choice.function.name
    elif isinstance(choice, wire.AllowedTools):
        allowed = [named.function.name for named in choice.allowed_tools.tools]
        for name in allowed:
            _check_named(name, names)
        tools = [tool for tool in tools if tool.function.name in allowed]
        mode = choice.allowed_tools.mode
    else:
        mode = choice
    if not tools:
        raise RequestError(f"tool_choice {mode!r} needs tools", param="tool_choice")
    if mode != "none" and not preparer.chat.control.has_tools:
        raise RequestError(
            "tools: this model's format has no tool calls; tool_choice 'none' or a json_schema "
            "response_format works",
            param="tools",
            code="unsupported_parameter",
        )
    return mode, tools


def _check_named(name: str, names: Sequence[str]) -> None:
    if name not in names:
        raise RequestError(f"tool_choice: no tool is called {name!r}", param="tool_choice")


async def chat_rules(preparer: Preparer, request: wire.ChatRequest) -> Rules:
    choice, callable_tools = _tool_choice(preparer, request)
    if choice == "none":
        return await format_rules(preparer, request.response_format)
    form = request.response_format
    if choice != "auto" or (form is not None and form.type == "text"):
        # Where a call is forced there is no text that a format could hold.
        form = None
    if form is not None and not form.type.startswith("json"):
        raise RequestError(
            "response_format: together with tools only json_object and json_schema work",
            param="response_format",
        )

    def compile_tools() -> Rules:
        tools = [tool.model_dump() for tool in callable_tools]
        # Not all need be callable; a message names a tool by its place in the request.
        places = [tool.function.name for tool in request.tools or ()]
        numbers = [i for i, tool in enumerate(tools) if tool["function"]["parameters"]]
        schemas = [
            HeldSchema(
                f"tools[{places.index(function['name'])}].function.parameters",
                function["parameters"],
                function["strict"],
                is_object=True,
            )
            for function in (tools[number]["function"] for number in numbers)
        ]
        if isinstance(form, wire.JsonSchemaFormat):
            schemas.append(_held_schema(form))

        def write(held: Sequence[Mapping[str, Any]]) -> str:
            for number, schema in zip(numbers, held, strict=False):
                tools[number]["function"]["parameters"] = schema
            return grammar_texts.tools_grammar(
                tools,
                preparer.chat.control,
                choice=choice,
                parallel=request.parallel_tool_calls,
                answer=None if form is None else _format_grammar(preparer, form, held[-1:]),
            )

        names = frozenset(tool.function.name for tool in callable_tools)
        return Rules(*_compile_schemas(preparer, schemas, write, "tools"), names)

    return await _in_time(preparer, compile_tools, "tools")


async def format_rules(preparer: Preparer, form: wire.ResponseFormat | None) -> Rules:
    if form is None or form.type == "text":
        return Rules()

    def compile_format() -> Rules:
        if isinstance(form, wire.JsonSchemaFormat):

            def write(held: Sequence[Mapping[str, Any]]) -> str:
                return _format_grammar(preparer, form, held)

            return Rules(
                *_compile_schemas(preparer, [_held_schema(form)], write, "response_format")
            )
        compiled = preparer.compiler.compile(
            _format_grammar(preparer, form, ()),
            "response_format",
            is_free=form.type == "grammar",
            timeout_s=preparer.config.limits.compile_s,
        )
        return Rules(compiled, compiled.warnings)

    return await _in_time(preparer, compile_format, "response_format")


def _compile_schemas(
    preparer: Preparer,
    schemas: Sequence[HeldSchema],
    write: Callable[[Sequence[Mapping[str, Any]]], str],
    param: str,
) -> tuple[CheckedGrammar, tuple[str, ...]]:
    timeout_s = preparer.config.limits.compile_s
    return preparer.compiler.compile_schemas(schemas, write, param, timeout_s=timeout_s)


def _held_schema(form: wire.JsonSchemaFormat) -> HeldSchema:
    named = form.json_schema
    schema = named.schema_ or {"type": "object"}
    return HeldSchema("response_format.json_schema.schema", schema, named.strict)


def _format_grammar(
    preparer: Preparer, form: wire.ResponseFormat, held: Sequence[Mapping[str, Any]]
) -> str:
    """The grammar of a response format, after a look at its size; `held` is what is left of its
    schema.
    """
    compiler = preparer.compiler
    if isinstance(form, wire.JsonSchemaFormat):
        return grammar_texts.json_schema_grammar(held[0], lenient=not form.json_schema.strict)
    if isinstance(form, wire.JsonObjectFormat):
        return grammar_texts.json_schema_grammar({"type": "object"}, lenient=False)
    if isinstance(form, wire.RegexFormat):
        compiler.check_size(len(form.regex), "response_format.regex")
        return grammar_texts.regex_grammar(form.regex)
    if isinstance(form, wire.ChoiceFormat):
        compiler.check_size(sum(map(len, form.choices)), "response_format.choices")
        return grammar_texts.choice_grammar(form.choices)
    assert isinstance(form, wire.GrammarFormat)
    return form.grammar


async def _in_time(preparer: Preparer, compile_rules: Callable[[], Rules], param: str) -> Rules:
    """Compile in a thread. What is over the time limit goes on there, bounded by its trial."""
    loop = asyncio.get_running_loop()
    # The start of the process that tries grammars is nobody's time.
    await loop.run_in_executor(preparer.compiler.threads, preparer.compiler.wait)
    try:
        async with asyncio.timeout(preparer.config.limits.compile_s):
            return await loop.run_in_executor(preparer.compiler.threads, compile_rules)
    except TimeoutError as error:
        message = f"{param}: compiling took longer than {preparer.config.limits.compile_s:g} s"
        raise RequestError(message, param=param, code="schema_too_complex") from error


def mask_plan(
    rules: Rules,
    banned: tuple[int, ...],
    *,
    thinking: bool = False,
    budget: int | None = None,
    begun: Beginning | None = None,
) -> MaskPlan | None:
    """What one answer is held to; None if it is held to nothing."""
    if rules.grammar is None and (not thinking or budget is None):
        return None
    return MaskPlan(rules.grammar, banned, thinking, budget, begun)
