"""Validated requests to jobs: images, tokens, limits, grammars, sampling parameters.

Whatever takes long - decoding images, encoding, compiling grammars - runs in threads.
"""

import asyncio
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from halfbyte.chat.mask_plan import Beginning
from halfbyte.chat.prompt import ControlTokens
from halfbyte.chat.router import Router
from halfbyte.chat.tools import with_missing_results
from halfbyte.engine.request import GenerationRequest, SamplingParams
from halfbyte.errors import RequestError
from halfbyte.server.api import tool_names, wire
from halfbyte.server.api.backend import Backend
from halfbyte.server.api.completion import Choice, Job
from halfbyte.server.api.pieces import Usage
from halfbyte.server.api.prompts import chat_prompt, image_inputs, prompt_ids
from halfbyte.server.api.reader import check_token_ids
from halfbyte.server.api.reading import check_count
from halfbyte.server.api.rules import (
    chat_rules,
    format_rules,
    mask_plan,
    may_think,
    settle_effort,
)

Number = TypeVar("Number", int, float)


async def chat_job(
    backend: Backend, request: wire.ChatRequest, *, clamp_max_tokens: bool = False
) -> Job:
    """Make a job of a chat request that has passed `check_sampling`.

    clamp_max_tokens   give the answer what the context leaves where less is left than was asked for

    Raises RequestError for everything that is the client's.
    """
    effort, warnings = settle_effort(backend, request.reasoning_effort)
    names = tool_names.client_names(request.tools or ())
    request = tool_names.for_model(request).model_copy(update={"reasoning_effort": effort})
    rules = await chat_rules(backend, request)
    thinking = may_think(backend, request)
    prompt, messages = await chat_prompt(backend, request)
    asked = request.max_completion_tokens or request.max_tokens
    if clamp_max_tokens and asked is not None:
        left = backend.config.max_model_len - len(prompt.token_ids)
        asked = min(asked, left) if left > 0 else None
    max_tokens = resolve_max_tokens(backend, len(prompt.token_ids), asked)
    banned = backend.banned_in_chat(thinking=thinking, tools=bool(rules.tool_names))
    answer_id = f"chatcmpl-{uuid.uuid4().hex}"
    images = await asyncio.to_thread(image_inputs, prompt)
    budget = request.max_reasoning_tokens
    begun = _beginning(request) if rules.grammar is not None else None
    if begun is not None and backend.upstream is not None:
        raise RequestError(
            "prefix: vLLM would begin the response_format or the tool calls anew after it; "
            "send one without the other",
            param="messages",
            code="unsupported_parameter",
        )
    plan = mask_plan(rules, banned, thinking=thinking, budget=budget, begun=begun)
    choices = []
    for index in range(request.n):
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
            f"{answer_id}-{index}",
            prompt.token_ids,
            params,
            images=images,
            priority=request.priority,
            rules=plan,
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
    """Make a job of a plain completion request: `n` choices of each prompt, in order."""
    prompts = request.prompts
    rules = await format_rules(backend, request.response_format)
    banned = backend.banned_in_text()
    plan = mask_plan(rules, banned)
    answer_id = f"cmpl-{uuid.uuid4().hex}"
    choices: list[Choice] = []
    num_prompt_tokens = 0
    for prompt in prompts:
        token_ids = await prompt_ids(backend, prompt)
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
            generation = GenerationRequest(
                f"{answer_id}-{index}", token_ids, params, priority=request.priority, rules=plan
            )
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


# --- limits and parameters ------------------------------------------------------------------


def check_sampling(backend: Backend, request: wire.Sampling) -> None:
    """Check the model's name and the limits that every completion has, before admission."""
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
    settled = with_missing_results(messages)
    if len(settled) == len(messages):
        return ()
    whole = {id(message) for message in messages}
    places = sorted({place for place, message in settled if id(message) not in whole})
    named = ", ".join(f"messages[{place}]" for place in places)
    return (f"calls without a result are taken as interrupted: {named}",)


def resolve_max_tokens(backend: Backend, num_prompt_tokens: int, asked: int | None) -> int:
    """Most tokens of an answer; RequestError (400) if prompt and answer exceed the context."""
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
    """Sampling parameters of one choice; choices of one seed get consecutive seeds."""
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


def _beginning(request: wire.ChatRequest) -> Beginning | None:
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
    return Beginning(f"{path}.content", text) if text or has_thought else None
