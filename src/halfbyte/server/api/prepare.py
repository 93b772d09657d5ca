"""Validated requests to jobs: images, tokens, limits, grammars, sampling parameters.

Whatever takes long - decoding images, encoding, compiling grammars - runs in threads.
"""

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from halfbyte.chat.mask_plan import Beginning, MaskPlan
from halfbyte.chat.prompt import ControlTokens
from halfbyte.chat.router import Router
from halfbyte.chat.tools import with_missing_results
from halfbyte.engine.request import GenerationRequest, ImageInput, SamplingParams
from halfbyte.errors import RequestError
from halfbyte.server.api import tool_names, wire
from halfbyte.server.api.backend import Backend
from halfbyte.server.api.completion import Choice, Job
from halfbyte.server.api.pieces import Usage
from halfbyte.server.api.preparer import Preparer
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
from halfbyte.server.call import Call

Number = TypeVar("Number", int, float)


@dataclass(frozen=True, slots=True)
class _Prompt:
    """One prompt, and what all answers to it have in common.

    logprobs, prompt_logprobs  alternatives to report at each token; None for no log-probs
    plan                       what the answers are held to
    control, tool_names        how an answer is structured; a plain continuation is not
    """

    answer_id: str
    token_ids: tuple[int, ...]
    max_tokens: int
    banned: tuple[int, ...]
    logprobs: int | None
    prompt_logprobs: int | None
    plan: MaskPlan | None
    images: tuple[ImageInput, ...] = ()
    control: ControlTokens = ControlTokens()  # noqa: RUF009  (frozen)
    tool_names: frozenset[str] = frozenset()
    is_plain: bool = False


@contextlib.asynccontextmanager
async def admitted(
    backend: Backend, request: wire.ChatRequest | wire.CompletionRequest, call: Call
) -> AsyncIterator[Job]:
    """The job of a request, whose answers have room while the body runs; warns the client.

    Raises RequestError: 400 and 404 for what is the client's, 429 and 503 if there is no room.
    """
    check_sampling(backend.preparer, request)
    num_prompts = 1 if isinstance(request, wire.ChatRequest) else len(request.prompts)
    with backend.admission.admit(call.key, request.n * num_prompts):
        if isinstance(request, wire.ChatRequest):
            job = await chat_job(backend, request)
        else:
            job = await text_job(backend.preparer, request)
        call.warn(job.warnings)
        yield job


async def chat_job(
    backend: Backend, request: wire.ChatRequest, *, clamp_max_tokens: bool = False
) -> Job:
    """Make a job of a chat request that has passed `check_sampling`.

    clamp_max_tokens   give the answer what the context leaves where less is left than was asked for

    Raises RequestError for everything that is the client's.
    """
    preparer, answers = backend.preparer, backend.answers
    effort, warnings = settle_effort(preparer, request.reasoning_effort)
    names = tool_names.client_names(request.tools or ())
    request = tool_names.for_model(request).model_copy(update={"reasoning_effort": effort})
    rules = await chat_rules(preparer, request)
    thinking = may_think(preparer, request)
    prompt, messages = await chat_prompt(preparer, request)
    asked = request.max_completion_tokens or request.max_tokens
    if clamp_max_tokens and asked is not None:
        left = preparer.config.max_model_len - len(prompt.token_ids)
        asked = min(asked, left) if left > 0 else None
    banned = preparer.banned_in_chat(thinking=thinking, tools=bool(rules.tool_names))
    begun = _beginning(request) if rules.grammar is not None else None
    answers.check(request, is_begun=begun is not None)
    common = _Prompt(
        f"chatcmpl-{uuid.uuid4().hex}",
        prompt.token_ids,
        resolve_max_tokens(preparer, len(prompt.token_ids), asked),
        banned,
        (request.top_logprobs or 0) if request.logprobs else None,
        request.prompt_logprobs,
        mask_plan(
            rules, banned, thinking=thinking, budget=request.max_reasoning_tokens, begun=begun
        ),
        images=await asyncio.to_thread(image_inputs, prompt),
        control=preparer.chat.control,
        tool_names=rules.tool_names,
    )
    return Job(
        common.answer_id,
        int(time.time()),
        request,
        [_choice(preparer, request, common, number, number) for number in range(request.n)],
        Usage(len(prompt.token_ids), image_tokens=sum(image.num_tokens for image in prompt.images)),
        (*warnings, *_interrupted(preparer, messages), *rules.warnings),
        messages=messages if answers.reads_messages else (),
        tool_names=names,
    )


async def text_job(preparer: Preparer, request: wire.CompletionRequest) -> Job:
    """Make a job of a plain completion request: `n` choices of each prompt, in order."""
    rules = await format_rules(preparer, request.response_format)
    banned = preparer.banned_in_text
    plan = mask_plan(rules, banned)
    answer_id = f"cmpl-{uuid.uuid4().hex}"
    choices: list[Choice] = []
    num_prompt_tokens = 0
    for prompt in request.prompts:
        token_ids = await prompt_ids(preparer, prompt)
        num_prompt_tokens += len(token_ids)
        # Zero tokens only score the prompt; the engine generates one, which is not shown.
        max_tokens = resolve_max_tokens(preparer, len(token_ids), max(request.max_tokens, 1))
        scored = scored_alternatives(request)
        common = _Prompt(
            answer_id, token_ids, max_tokens, banned, request.logprobs, scored, plan, is_plain=True
        )
        for number in range(request.n):
            choices.append(_choice(preparer, request, common, len(choices), number))
    usage = Usage(num_prompt_tokens)
    return Job(answer_id, int(time.time()), request, choices, usage, rules.warnings)


def _choice(
    preparer: Preparer, request: wire.Sampling, prompt: _Prompt, index: int, number: int
) -> Choice:
    """The answer `index` of a request: the one of this `number` to its prompt."""
    generation = GenerationRequest(
        f"{prompt.answer_id}-{index}",
        prompt.token_ids,
        _sampling_params(preparer, request, prompt, index, number),
        images=prompt.images,
        priority=request.priority,
        rules=prompt.plan,
    )
    router = Router(
        preparer.chat.vocabulary,
        prompt.control,
        stops=request.stops,
        keeps_stop=request.include_stop_str_in_output,
        tool_names=prompt.tool_names,
    )
    return Choice(
        index,
        generation,
        router,
        has_own_prompt=number == 0,
        want_entries=prompt.logprobs is not None,
        is_plain=prompt.is_plain,
        keeps_stop=request.include_stop_str_in_output,
    )


def _sampling_params(
    preparer: Preparer, request: wire.Sampling, prompt: _Prompt, index: int, number: int
) -> SamplingParams:
    """Sampling parameters of one choice; choices of one seed get consecutive seeds."""
    defaults = preparer.config.sampling
    ends = () if request.ignore_eos else preparer.chat.vocabulary.eos_token_ids
    params = SamplingParams(
        max_tokens=prompt.max_tokens,
        temperature=_given(request.temperature, defaults.temperature),
        top_p=_given(request.top_p, defaults.top_p),
        top_k=max(_given(request.top_k, defaults.top_k), 0),
        min_p=_given(request.min_p, defaults.min_p),
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        repetition_penalty=_given(request.repetition_penalty, defaults.repetition_penalty),
        seed=None if request.seed is None else request.seed + index,
        logprobs=prompt.logprobs,
        # A conversation's answers have one prompt, which is told of once.
        prompt_logprobs=prompt.prompt_logprobs if prompt.is_plain or number == 0 else None,
        logit_bias={int(key): bias for key, bias in (request.logit_bias or {}).items()},
        banned_token_ids=prompt.banned,
        stop_token_ids=(*ends, *(request.stop_token_ids or ())),
        ignore_eos=request.ignore_eos,
        min_tokens=request.min_tokens,
    )
    params.validate(preparer.config.vocab_size)
    return params


def scored_alternatives(request: wire.CompletionRequest) -> int | None:
    """Alternatives to have at each token of the prompt, for `echo` or `prompt_logprobs`."""
    asked = [request.prompt_logprobs, request.logprobs if request.echo else None]
    return max((one for one in asked if one is not None), default=None)


def check_sampling(preparer: Preparer, request: wire.Sampling) -> None:
    """Check the model's name and the limits that every completion has, before admission."""
    preparer.check_model(request.model)
    limits = preparer.config.limits
    check_count(request.n, limits.choices, "n", what="choices")
    check_count(len(request.stops), limits.stops, "stop", what="stop strings")
    for stop in request.stops:
        check_count(len(stop), limits.stop_chars, "stop", what="characters in one stop string")
    if isinstance(request, wire.CompletionRequest):
        check_count(len(request.prompts) * request.n, limits.prompts, "prompt", what="answers")
    check_count(len(request.stop_token_ids or ()), limits.stop_tokens, "stop_token_ids")
    check_count(len(request.logit_bias or ()), limits.biased_tokens, "logit_bias")
    check_token_ids(preparer.chat, [int(key) for key in request.logit_bias or ()], "logit_bias")
    check_token_ids(preparer.chat, request.stop_token_ids or (), "stop_token_ids")


def _interrupted(preparer: Preparer, messages: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """What to warn of: calls that the client left without a result."""
    if not preparer.chat.control.has_tools:
        return ()
    settled = with_missing_results(messages)
    if len(settled) == len(messages):
        return ()
    whole = {id(message) for message in messages}
    places = sorted({place for place, message in settled if id(message) not in whole})
    named = ", ".join(f"messages[{place}]" for place in places)
    return (f"calls without a result are taken as interrupted: {named}",)


def resolve_max_tokens(preparer: Preparer, num_prompt_tokens: int, asked: int | None) -> int:
    """Most tokens of an answer; RequestError (400) if prompt and answer exceed the context."""
    context = preparer.config.max_model_len
    if num_prompt_tokens + (asked or 1) > context:
        answer = f" and {asked} for the answer" if asked else " and room for an answer"
        raise RequestError(
            f"this model's context is {context} tokens; the request needs {num_prompt_tokens} for "
            f"the prompt{answer}",
            param="messages" if asked is None else "max_tokens",
            code="context_length_exceeded",
        )
    return asked or context - num_prompt_tokens


def _given(value: Number | None, default: Number) -> Number:
    return default if value is None else value


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
