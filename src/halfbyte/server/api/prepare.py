"""Validated requests to jobs: images, tokens, limits, grammars, sampling parameters.

Whatever takes long - decoding images, encoding, compiling grammars - runs in threads.
"""

import asyncio
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from halfbyte.chat import grammar_texts
from halfbyte.chat.grammar_masks import CompiledGrammar, Mask, ThoughtMask
from halfbyte.chat.images import ImageLimits, data_url_bytes, decode_pixels, open_image
from halfbyte.chat.prompt import ControlTokens, EncodedImage, EncodedPrompt
from halfbyte.chat.router import Router
from halfbyte.chat.schema import HeldSchema
from halfbyte.chat.tools import with_results
from halfbyte.engine.request import GenerationRequest, ImageInput, SamplingParams
from halfbyte.errors import RequestError
from halfbyte.pictures import Picture
from halfbyte.server.api import tool_names, wire
from halfbyte.server.api.backend import Backend
from halfbyte.server.api.completion import Choice, Job
from halfbyte.server.api.fetch import fetch_image
from halfbyte.server.api.pieces import Usage
from halfbyte.server.api.reader import Conversation, Shape, check_token_ids
from halfbyte.server.api.reading import check_count

# Messages that are made plain on the event loop.
_FEW_MESSAGES = 64

# Readers of URLs drop these at both ends (WHATWG URL, "basic URL parser").
_AROUND_URLS = "".join(map(chr, range(0x21)))

Number = TypeVar("Number", int, float)

# Efforts by how much they ask for; other names are nobody's.
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


@dataclass(frozen=True, slots=True)
class Rules:
    """What holds an answer: a compiled grammar, and the tools that may be called.

    warnings   what of the request's schemas is not held
    """

    compiled: CompiledGrammar | None = None
    warnings: tuple[str, ...] = ()
    tool_names: frozenset[str] = frozenset()


async def chat_job(
    backend: Backend, request: wire.ChatRequest, *, clamp_max_tokens: bool = False
) -> Job:
    """A job from a chat request that has passed `check_sampling`.

    clamp_max_tokens   give the answer what the context leaves where less is left than was asked for

    Raises RequestError for everything that is the client's.
    """
    effort, warnings = settle_effort(backend, request.reasoning_effort)
    names = tool_names.client_names(request.tools or ())
    request = tool_names.for_model(request).model_copy(update={"reasoning_effort": effort})
    rules = await _chat_rules(backend, request)
    thinking = _may_think(backend, request)
    prompt, messages = await chat_prompt(backend, request)
    asked = request.max_completion_tokens or request.max_tokens
    if clamp_max_tokens and asked is not None:
        left = backend.config.max_model_len - len(prompt.token_ids)
        asked = min(asked, left) if left > 0 else None
    max_tokens = resolve_max_tokens(backend, len(prompt.token_ids), asked)
    banned = backend.banned_in_chat(thinking=thinking, tools=bool(rules.tool_names))
    answer_id = f"chatcmpl-{uuid.uuid4().hex}"
    images = await asyncio.to_thread(_image_inputs, prompt)
    budget = request.max_reasoning_tokens
    begun = _beginning(request) if rules.compiled is not None else None
    if begun is None:
        masks = [_mask(backend, rules, banned, thinking, budget) for _ in range(request.n)]
    else:
        masks = await asyncio.to_thread(
            _begun_masks, backend, rules, banned, thinking, begun, request
        )
    choices = []
    for index, mask in enumerate(masks):
        params = sampling_params(
            backend,
            request,
            index,
            max_tokens=max_tokens,
            banned=banned,
            logprobs=(request.top_logprobs or 0) if request.logprobs else None,
            # The choices have one prompt.
            prompt_logprobs=request.prompt_logprobs if index == 0 else None,
        )
        generation = GenerationRequest(
            f"{answer_id}-{index}", prompt.token_ids, params, mask, images
        )
        router = Router(
            backend.chat.vocabulary,
            backend.chat.control,
            stops=request.stops,
            keeps_stop=request.include_stop_str_in_output,
            tool_names=rules.tool_names,
        )
        choices.append(
            Choice(
                index,
                generation,
                router,
                has_own_prompt=index == 0,
                want_entries=request.logprobs,
                keeps_stop=request.include_stop_str_in_output,
                mask=mask,
            )
        )
    usage = Usage(
        len(prompt.token_ids), image_tokens=sum(image.num_tokens for image in prompt.images)
    )
    warnings = (*warnings, *_interrupted(backend, messages), *rules.warnings)
    job = Job(answer_id, int(time.time()), choices, usage, warnings, tool_names=names)
    upstream = backend.upstream
    if upstream is not None:
        if request.prompt_logprobs is not None:
            raise RequestError(
                "prompt_logprobs: in front of vLLM only /v1/completions has them",
                param="prompt_logprobs",
                code="unsupported_parameter",
            )
        job.source = lambda: upstream.chat(request, messages, job)
    return job


async def text_job(backend: Backend, request: wire.CompletionRequest) -> Job:
    """A job from a plain completion request: `n` choices of each prompt, in order."""
    prompts = request.prompts
    rules = await _format_rules(backend, request.response_format)
    banned = backend.banned_in_text()
    answer_id = f"cmpl-{uuid.uuid4().hex}"
    choices: list[Choice] = []
    num_prompt_tokens = 0
    for prompt in prompts:
        token_ids = await _prompt_ids(backend, prompt)
        num_prompt_tokens += len(token_ids)
        # Zero tokens only score the prompt; the engine generates one, which is not shown.
        max_tokens = resolve_max_tokens(backend, len(token_ids), max(request.max_tokens, 1))
        for number in range(request.n):
            index = len(choices)
            params = sampling_params(
                backend,
                request,
                index,
                max_tokens=max_tokens,
                banned=banned,
                logprobs=request.logprobs,
                prompt_logprobs=scored_alternatives(request),
            )
            mask = _mask(backend, rules, banned, False, None)
            generation = GenerationRequest(f"{answer_id}-{index}", token_ids, params, mask)
            router = Router(
                backend.chat.vocabulary,
                ControlTokens(),
                stops=request.stops,
                keeps_stop=request.include_stop_str_in_output,
            )
            choices.append(
                Choice(
                    index,
                    generation,
                    router,
                    has_own_prompt=number == 0,
                    want_entries=request.logprobs is not None,
                    is_plain=True,
                    keeps_stop=request.include_stop_str_in_output,
                    mask=mask,
                )
            )
    job = Job(answer_id, int(time.time()), choices, Usage(num_prompt_tokens), rules.warnings)
    upstream = backend.upstream
    if upstream is not None:
        job.source = lambda: upstream.text(request, job)
    return job


def scored_alternatives(request: wire.CompletionRequest) -> int | None:
    """Alternatives to have at each token of the prompt, for `echo` or `prompt_logprobs`."""
    asked = [request.prompt_logprobs, request.logprobs if request.echo else None]
    return max((one for one in asked if one is not None), default=None)


# --- prompts --------------------------------------------------------------------------------


async def chat_prompt(
    backend: Backend, request: wire.ChatRequest
) -> tuple[EncodedPrompt, list[dict[str, Any]]]:
    """The prompt of a conversation, and its messages with their images decoded."""
    limits = backend.config.limits
    check_count(len(request.messages), limits.messages, "messages")
    check_count(len(request.tools or ()), limits.tools, "tools")
    messages = await resolved_messages(backend, request.messages)
    prompt = await encode_resolved(
        backend,
        messages,
        tools=[tool.model_dump() for tool in request.tools or ()],
        reasoning_effort=request.reasoning_effort,
        json_schema=_shown_schema(request.response_format),
        continue_final=request.continues_final,
    )
    return prompt, messages


async def resolved_messages(
    backend: Backend, messages: Sequence[wire.Message]
) -> list[dict[str, Any]]:
    """Messages as plain objects, their images fetched and decoded."""

    def dump() -> list[dict[str, Any]]:
        return [message.model_dump(exclude_none=True) for message in messages]

    plain = dump() if len(messages) <= _FEW_MESSAGES else await asyncio.to_thread(dump)
    await _resolve_images(backend, plain)
    return plain


async def encode_resolved(
    backend: Backend,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]],
    reasoning_effort: str | None,
    json_schema: Mapping[str, Any] | None = None,
    continue_final: bool,
) -> EncodedPrompt:
    """Token ids of a conversation whose images are decoded."""
    for index, message in enumerate(messages[:-1]):
        if message.get("prefix"):
            path = f"messages[{index}].prefix"
            raise RequestError(f"{path}: only the last message can be one", param=path)

    shown, pictures = _shapes(messages)
    asked = Conversation(shown, tools, reasoning_effort, json_schema, continue_final)
    size = sum(map(len, asked.texts(backend.chat)))
    prompt = await backend.aside.do(size, backend.reader.encode, asked)
    images = tuple(
        EncodedImage(pixels, one.offset, one.num_tokens)
        for pixels, one in zip(pictures, prompt.images, strict=True)
    )
    return EncodedPrompt(prompt.token_ids, images)


def _shapes(
    messages: Sequence[Mapping[str, Any]],
) -> tuple[list[Mapping[str, Any]], list[NDArray[np.uint8]]]:
    """Messages with the shapes of their pictures, and the pictures in order."""
    shown: list[Mapping[str, Any]] = []
    pictures: list[NDArray[np.uint8]] = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list) and any("image" in part for part in content):
            parts = []
            for part in content:
                pixels = part.get("image")
                if pixels is not None:
                    pictures.append(pixels)
                    part = {**part, "image": Shape(*pixels.shape[1:])}
                parts.append(part)
            message = {**message, "content": parts}
        shown.append(message)
    return shown, pictures


async def _resolve_images(backend: Backend, messages: list[dict[str, Any]]) -> None:
    """Replace image URLs by the images' pixels, and thoughts in parts by their text, in place.

    All headers are read first: images whose tokens do not fit the context are never decoded.
    """
    limits = backend.config.limits
    opened: list[tuple[list[dict[str, Any]], int, str, Picture]] = []
    for index, message in enumerate(messages):
        content = message.get("content")
        if not isinstance(content, list):
            continue
        for number, part in enumerate(content):
            if part["type"] == "thinking" and isinstance(part["thinking"], list):
                part["thinking"] = "".join(text["text"] for text in part["thinking"])
            if part["type"] != "image_url":
                continue
            path = f"messages[{index}].content[{number}].image_url"
            check_count(len(opened) + 1, limits.images, "messages", what="images")
            if backend.chat.image_layout is None:
                raise RequestError(
                    f"{path}: this model takes text only", param=path, code="unsupported_content"
                )
            value = part["image_url"]
            url = value if isinstance(value, str) else value["url"]
            opened.append((content, number, path, await _open_image(backend, url, path)))
            _check_images(backend, [picture for *_, picture in opened])
    layout = backend.chat.image_layout
    if layout is None:
        return
    try:
        for content, number, path, picture in opened:
            # Scaled at once; what waits its turn here is a file in memory, not pixels.
            async with backend.decoding:
                pixels = await asyncio.to_thread(decode_pixels, picture, path, layout)
            content[number] = {"type": "image", "image": pixels}
    finally:
        if opened:
            backend.body_room.trim_soon()


async def _open_image(backend: Backend, url: str, path: str) -> Picture:
    limits = backend.config.limits
    image_limits = ImageLimits(limits.image_bytes, limits.image_pixels)
    url = url.strip(_AROUND_URLS)
    if url[:5].lower() == "data:":
        data = await asyncio.to_thread(data_url_bytes, url, path, image_limits)
    else:
        data = await fetch_image(url, path, backend.config.image_fetch, limits.image_bytes)
    return await asyncio.to_thread(open_image, data, path, image_limits)


def _check_images(backend: Backend, pictures: Sequence[Picture]) -> None:
    """400 for images that together are too many pixels, or more tokens than the context has."""
    layout = backend.chat.image_layout
    assert layout is not None
    pixels = sum(picture.width * picture.height for picture in pictures)
    check_count(pixels, backend.config.limits.request_pixels, "messages", what="pixels of images")
    num_tokens = 0
    for picture in pictures:
        width, height = layout.size(picture.width, picture.height)
        num_tokens += layout.num_tokens(height, width)
    if num_tokens >= backend.config.max_model_len:
        raise RequestError(
            f"this model's context is {backend.config.max_model_len} tokens; the request's images "
            f"alone need {num_tokens}",
            param="messages",
            code="context_length_exceeded",
        )


def _image_inputs(prompt: EncodedPrompt) -> tuple[ImageInput, ...]:
    return tuple(
        ImageInput.of(image.pixels, image.offset, image.num_tokens) for image in prompt.images
    )


async def encode_plain(backend: Backend, text: str, *, with_start: bool = True) -> tuple[int, ...]:
    """Token ids of a plain prompt, with what the model's prompts begin with or without."""

    return await backend.aside.do(len(text), backend.reader.encode_plain, text, with_start)


async def _prompt_ids(backend: Backend, prompt: str | list[int]) -> tuple[int, ...]:
    if isinstance(prompt, str):
        token_ids = await encode_plain(backend, prompt)
        if not token_ids:
            raise RequestError("the prompt is empty", param="prompt")
        return token_ids
    check_token_ids(backend.chat, prompt, "prompt")
    return tuple(prompt)


# --- limits and parameters ------------------------------------------------------------------


def check_sampling(backend: Backend, request: wire.Sampling) -> None:
    """Model name and the limits of what every completion has; cheap, done before admission."""
    backend.check_model(request.model)
    limits = backend.config.limits
    check_count(request.n, limits.choices, "n", what="choices")
    check_count(len(request.stops), limits.stops, "stop", what="stop strings")
    for stop in request.stops:
        check_count(len(stop), limits.stop_chars, "stop", what="characters in one stop string")
    if isinstance(request, wire.CompletionRequest):
        check_count(len(request.prompts) * request.n, limits.prompts, "prompt", what="answers")
    check_count(len(request.stop_token_ids or ()), limits.stop_tokens, "stop_token_ids")
    check_count(len(request.logit_bias or ()), limits.biased_tokens, "logit_bias")
    check_token_ids(backend.chat, [int(key) for key in request.logit_bias or ()], "logit_bias")
    check_token_ids(backend.chat, request.stop_token_ids or (), "stop_token_ids")


def _interrupted(backend: Backend, messages: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """What to warn of: calls that the client left without a result."""
    if not backend.chat.control.has_tools:
        return ()
    settled = with_results(messages)
    if len(settled) == len(messages):
        return ()
    whole = {id(message) for message in messages}
    places = sorted({place for place, message in settled if id(message) not in whole})
    named = ", ".join(f"messages[{place}]" for place in places)
    return (f"calls without a result are taken as interrupted: {named}",)


def resolve_max_tokens(backend: Backend, num_prompt_tokens: int, asked: int | None) -> int:
    """Tokens that an answer may have; 400 if prompt and answer do not fit the context."""
    context = backend.config.max_model_len
    if num_prompt_tokens + (asked or 1) > context:
        answer = f" and {asked} for the answer" if asked else " and room for an answer"
        raise RequestError(
            f"this model's context is {context} tokens; the request needs {num_prompt_tokens} for "
            f"the prompt{answer}",
            param="messages" if asked is None else "max_tokens",
            code="context_length_exceeded",
        )
    return asked or context - num_prompt_tokens


def sampling_params(
    backend: Backend,
    request: wire.Sampling,
    index: int,
    *,
    max_tokens: int,
    banned: tuple[int, ...],
    logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """Parameters of one choice; choices of one seed get consecutive seeds."""
    defaults = backend.config.sampling
    ends = () if request.ignore_eos else backend.chat.vocabulary.eos_token_ids
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=_given(request.temperature, defaults.temperature),
        top_p=_given(request.top_p, defaults.top_p),
        top_k=max(_given(request.top_k, defaults.top_k), 0),
        min_p=_given(request.min_p, defaults.min_p),
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        repetition_penalty=_given(request.repetition_penalty, defaults.repetition_penalty),
        seed=None if request.seed is None else request.seed + index,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        logit_bias={int(key): bias for key, bias in (request.logit_bias or {}).items()},
        banned_token_ids=banned,
        stop_token_ids=(*ends, *(request.stop_token_ids or ())),
        ignore_eos=request.ignore_eos,
        min_tokens=request.min_tokens,
    )
    params.validate(backend.config.vocab_size)
    return params


def _given(value: Number | None, default: Number) -> Number:
    return default if value is None else value


# --- rules of an answer ---------------------------------------------------------------------


def settle_effort(backend: Backend, asked: str | None) -> tuple[str | None, tuple[str, ...]]:
    """The reasoning effort that stands for the one asked for, and what to warn of.

    The nearest that the model knows, of two as near the higher. A model without efforts does what
    it always does. Raises RequestError for a name that is no effort, and with `strict_effort` for
    each that the model does not know.
    """
    known = backend.chat.reasoning_efforts
    if asked is None or asked in known or (asked == "none" and not known):
        return asked, ()
    names = ", ".join(known) or "none"
    if backend.config.strict_effort or asked not in _EFFORTS:
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


def _may_think(backend: Backend, request: wire.ChatRequest) -> bool:
    """Whether the answer may hold a thought: the effort says so, where the model knows efforts."""
    chat = backend.chat
    effort = request.reasoning_effort or chat.default_effort
    thinking = chat.control.has_thinking and (not chat.reasoning_efforts or effort != "none")
    if request.max_reasoning_tokens is not None and not chat.control.has_thinking:
        raise RequestError(
            "max_reasoning_tokens: this model has no thoughts",
            param="max_reasoning_tokens",
            code="unsupported_parameter",
        )
    return thinking


def _tool_choice(backend: Backend, request: wire.ChatRequest) -> tuple[str, list[wire.Tool]]:
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
    if mode != "none" and not backend.chat.control.has_tools:
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


async def _chat_rules(backend: Backend, request: wire.ChatRequest) -> Rules:
    choice, callable_tools = _tool_choice(backend, request)
    if choice == "none":
        return await _format_rules(backend, request.response_format)
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
                backend.chat.control,
                choice=choice,
                parallel=request.parallel_tool_calls,
                answer=None if form is None else _format_grammar(backend, form, held[-1:]),
            )

        names = frozenset(tool.function.name for tool in callable_tools)
        return Rules(*_compile_schemas(backend, schemas, write, "tools"), names)

    return await _in_time(backend, compile_tools, "tools")


async def _format_rules(backend: Backend, form: wire.ResponseFormat | None) -> Rules:
    if form is None or form.type == "text":
        return Rules()

    def compile_format() -> Rules:
        if isinstance(form, wire.JsonSchemaFormat):

            def write(held: Sequence[Mapping[str, Any]]) -> str:
                return _format_grammar(backend, form, held)

            return Rules(*_compile_schemas(backend, [_held_schema(form)], write, "response_format"))
        compiled = backend.compiler.compile(
            _format_grammar(backend, form, ()),
            "response_format",
            is_free=form.type == "grammar",
            timeout_s=backend.config.limits.compile_s,
        )
        return Rules(compiled, compiled.warnings)

    return await _in_time(backend, compile_format, "response_format")


def _compile_schemas(
    backend: Backend,
    schemas: Sequence[HeldSchema],
    write: Callable[[Sequence[Mapping[str, Any]]], str],
    param: str,
) -> tuple[CompiledGrammar, tuple[str, ...]]:
    timeout_s = backend.config.limits.compile_s
    return backend.compiler.compile_schemas(schemas, write, param, timeout_s=timeout_s)


def _held_schema(form: wire.JsonSchemaFormat) -> HeldSchema:
    named = form.json_schema
    schema = named.schema_ or {"type": "object"}
    return HeldSchema("response_format.json_schema.schema", schema, named.strict)


def _format_grammar(
    backend: Backend, form: wire.ResponseFormat, held: Sequence[Mapping[str, Any]]
) -> str:
    """The grammar of a response format, after a look at its size; `held` is what is left of its
    schema.
    """
    compiler = backend.compiler
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


async def _in_time(backend: Backend, compile_rules: Callable[[], Rules], param: str) -> Rules:
    """Compile in a thread. What is over the time limit goes on there, bounded by its trial."""
    loop = asyncio.get_running_loop()
    # The start of the process that tries grammars is nobody's time.
    await loop.run_in_executor(backend.compiler.threads, backend.compiler.wait)
    try:
        async with asyncio.timeout(backend.config.limits.compile_s):
            return await loop.run_in_executor(backend.compiler.threads, compile_rules)
    except TimeoutError as error:
        message = f"{param}: compiling took longer than {backend.config.limits.compile_s:g} s"
        raise RequestError(message, param=param, code="schema_too_complex") from error


def _mask(
    backend: Backend,
    rules: Rules,
    banned: tuple[int, ...],
    thinking: bool,
    budget: int | None,
) -> Mask | None:
    inner = backend.compiler.mask(rules.compiled, banned) if rules.compiled is not None else None
    if not thinking or (inner is None and budget is None):
        return inner
    return ThoughtMask(backend.chat.vocabulary, backend.chat.control, inner, budget)


@dataclass(frozen=True, slots=True)
class _Beginning:
    """What of an answer is there already; `path` is where the request has it."""

    path: str
    text: str


def _beginning(request: wire.ChatRequest) -> _Beginning | None:
    """The beginning of a message that is to be continued; None if nothing has begun."""
    last = request.messages[-1]
    if not request.continues_final or not isinstance(last, wire.AssistantMessage):
        return None
    path = f"messages[{len(request.messages) - 1}]"
    if last.tool_calls:
        raise RequestError(
            f"{path}.tool_calls: an answer that has called tools is not continued under rules; "
            "leave out prefix, or tools and response_format",
            param=f"{path}.tool_calls",
        )
    content = last.content or ""
    if isinstance(content, str):
        text = content
        has_thought = False
    else:
        text = "".join(
            part.refusal if isinstance(part, wire.RefusalPart) else part.text
            for part in content
            if not isinstance(part, wire.ThinkingPart)
        )
        has_thought = len(content) > 0
    has_thought = has_thought or bool(last.reasoning or last.reasoning_content)
    return _Beginning(f"{path}.content", text) if text or has_thought else None


def _begun_masks(
    backend: Backend,
    rules: Rules,
    banned: tuple[int, ...],
    thinking: bool,
    begun: _Beginning,
    request: wire.ChatRequest,
) -> list[Mask | None]:
    """Masks of an answer that has begun; 400 if its beginning is none of what the rules allow."""
    if backend.upstream is not None:
        raise RequestError(
            "prefix: vLLM would begin the response_format or the tool calls anew after it; "
            "send one without the other",
            param="messages",
            code="unsupported_parameter",
        )
    assert rules.compiled is not None
    vocabulary = backend.chat.vocabulary
    token_ids = vocabulary.encode_text(begun.text)
    masks: list[Mask | None] = []
    for _ in range(request.n):
        mask = backend.compiler.mask(rules.compiled, banned)
        num_fitting = mask.begin(token_ids)
        if num_fitting < len(token_ids):
            shown = vocabulary.decode(token_ids[:num_fitting])[-100:]
            raise RequestError(
                f"{begun.path}: the answer cannot begin so; what response_format or tools allow "
                f"leaves it after {shown!r}",
                param=begun.path,
            )
        masks.append(
            ThoughtMask(
                vocabulary,
                backend.chat.control,
                mask,
                request.max_reasoning_tokens,
                has_begun=True,
            )
            if thinking
            else mask
        )
    return masks


def _shown_schema(form: wire.ResponseFormat | None) -> Mapping[str, Any] | None:
    """The schema that models with a place for it are told about."""
    if isinstance(form, wire.JsonSchemaFormat):
        return form.json_schema.schema_
    if isinstance(form, wire.JsonObjectFormat):
        return {"type": "object"}
    return None
