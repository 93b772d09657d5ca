"""Ask a model once, try again where that may help, and write down what came back."""

import asyncio
import hashlib
import json
import random
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from inspect_ai.model import (
    ChatMessageUser,
    ContentImage,
    ContentText,
    GenerateConfig,
    Model,
    ModelOutput,
)

from halfbyte.evals.config import RunConfig, seed_for
from halfbyte.evals.reasoning import split_reasoning
from halfbyte.evals.running.endpoint import Endpoint
from halfbyte.evals.running.progress import RunProgress
from halfbyte.evals.running.provider import TOOL_CALLS
from halfbyte.evals.score import Graders
from halfbyte.evals.tasks.benchmark import Benchmark, Steps
from halfbyte.evals.types import (
    Attempt,
    Conversation,
    Image,
    Prompt,
    Reply,
    Sample,
    Text,
    ToolCall,
)
from halfbyte.json_lines import JsonLines

Key = tuple[str, int]


FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 60.0


_TRIED = 2  # items of the start-up check, of which one answer is enough
_REFUSALS = (400, 413, 422)  # the request itself is not acceptable


_SETUP_FAULTS = (401, 402, 403, 404)  # no request of this run will be acceptable


_PROMPT_MARGIN_TOKENS = 256


# Eight letters, or a run of one mark or of blanks, are seldom more than a token; a digit, or a
# letter beyond ASCII, may be one by itself.
_PIECE = re.compile(r"[A-Za-z]{1,8}|\d|([^\w\s])\1*|[^\sA-Za-z0-9]|\s{2,}|\n")


@dataclass(slots=True)
class Room:
    """The mutable state of one benchmark's run: journals and what they hold.

    open_attempts  answered but not graded; emptied as trajectories finish, so memory stays flat
    """

    benchmark: Benchmark
    config: RunConfig
    endpoint: Endpoint
    prompt_id: str
    run_id: str
    max_tokens: int
    attempts: JsonLines
    samples: JsonLines
    progress: RunProgress
    graders: Graders
    answered: dict[Key, Attempt] = field(default_factory=dict)
    graded: set[Key] = field(default_factory=set)
    clients: list[Model] = field(default_factory=list)
    open_units: int = 0
    fault: str | None = None


def prompt_sha256(prompt: Prompt) -> str:
    """SHA-256 of a rendered prompt, its images or tools included."""
    if isinstance(prompt, Conversation):
        return hashlib.sha256(_as_text(prompt).encode()).hexdigest()
    parts = [("image", p.uri) if isinstance(p, Image) else ("text", p.text) for p in prompt]
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()


def max_tokens_for(prompt: Prompt, limit: int, context_tokens: int | None) -> int:
    """Output limit of one request: the configured one, or what the context leaves.

    The prompt's length is bounded from above without a tokenizer, so that both arms get the same
    limit: 2,800 tokens an image, `most_tokens` for a text.
    """
    if context_tokens is None:
        return limit
    if isinstance(prompt, Conversation):
        taken = most_tokens(_as_text(prompt))
    else:
        taken = sum(2_800 if isinstance(p, Image) else most_tokens(p.text) for p in prompt)
    return min(limit, max(16, context_tokens - taken - _PROMPT_MARGIN_TOKENS))


def _as_text(conversation: Conversation) -> str:
    """A conversation and its tools as JSON, which is longer than what a model sees of them."""
    parts = [list(conversation.messages), list(conversation.tools)]
    return json.dumps(parts, ensure_ascii=False)


def most_tokens(text: str) -> int:
    """A number of tokens that a text will hardly exceed, whatever the vocabulary.

    On the 30 document sets of AA-LCR it is 1.11 to 1.25 times the count of a 131,072-entry
    vocabulary. Characters alone would not do: those texts have 2.5 to 4.8 of them to a token, and a
    bound that holds for the one leaves the longest of the others no room in a context of 196,608.
    """
    return sum(1 for _ in _PIECE.finditer(text)) * 23 // 20


def _settings(
    benchmark: Benchmark, config: RunConfig, sample: Sample, repeat: int, max_tokens: int
) -> GenerateConfig:
    """What is asked beside a prompt, in the start-up check as in every attempt."""
    sampling = config.sampling_for(benchmark)
    return GenerateConfig(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        reasoning_effort=sampling.reasoning_effort,
        max_tokens=max_tokens,
        seed=seed_for(benchmark.name, sample.item_id, repeat, config.seed_shift),
    )


async def refusal_of(
    benchmark: Benchmark, samples: Sequence[Sample], config: RunConfig, model: Model
) -> str | None:
    """Why the server will answer no item of a benchmark as it is to be asked; None if it may.

    The shortest items are asked, with their pictures, settings and seed, for a single token. One
    item may be refused for what it says; two different ones are for how they are asked. What may
    pass by itself (a busy or starting server) is left to the attempts and their retries.
    """
    prompts = {one.item_id: benchmark.prompt(one, (), config.options) for one in samples}
    shortest = sorted(samples, key=lambda one: _characters(prompts[one.item_id]))[:_TRIED]
    said: str | None = None
    for sample in shortest:
        settings = _settings(benchmark, config, sample, 0, 1)
        try:
            await _generate(model, prompts[sample.item_id], settings)
        except Exception as failure:
            if _status_of(failure) not in (*_REFUSALS, *_SETUP_FAULTS):
                return None
            said = explain(failure)
        else:
            return None
    return said


# Asked of a server before a run of tool calls, whatever the items are.
_TOOL_NAME = "ring_bell"
_TOOL_TRIAL = Conversation(
    ({"role": "user", "content": "Ring the bell twice."},),
    (
        {
            "type": "function",
            "function": {
                "name": _TOOL_NAME,
                "description": "Ring the bell.",
                "parameters": {
                    "type": "object",
                    "properties": {"times": {"type": "integer", "description": "How often."}},
                    "required": ["times"],
                },
            },
        },
    ),
)
_TRIAL_TOKENS = 2_048


async def tool_fault_of(benchmark: Benchmark, config: RunConfig, model: Model) -> str | None:
    """Why a server cannot answer with tool calls; None if it can, or if it cannot be told.

    A call is required by the request, so that what the model would rather say does not matter. A
    server that knows no required calls, or that answers at length first, is left to the attempts.
    """
    sampling = config.sampling_for(benchmark)
    settings = GenerateConfig(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        reasoning_effort=sampling.reasoning_effort,
        max_tokens=min(sampling.max_tokens, _TRIAL_TOKENS),
        seed=0,
    )
    try:
        output = await _generate(model, _TOOL_TRIAL, settings, tool_choice="required")
    except Exception:  # as attempts ask has been tried by `refusal_of`
        return None
    reply = _read_output(output, 0)
    is_cut = output.stop_reason in ("max_tokens", "model_length")
    if reply.output is None or is_cut or _calls_of(output):
        return None
    said = output.completion[:120]
    return (
        "it takes tools but makes no tool calls: asked for a call that the request required, it "
        f"answered {said!r}. Start the server with its tool-call parser"
    )


def _characters(prompt: Prompt) -> int:
    if isinstance(prompt, Conversation):
        return len(_as_text(prompt))
    return sum(len(part.uri if isinstance(part, Image) else part.text) for part in prompt)


async def ask_until_answered(
    room: Room, sample: Sample, repeat: int, earlier: Sequence[str], model: Model
) -> Attempt:
    """An item with its retries, of a conversation all steps; whatever happens is an attempt."""
    prompt = room.benchmark.prompt(sample, earlier, room.config.options)
    blank = Attempt(
        benchmark=room.benchmark.name,
        item_id=sample.item_id,
        repeat=repeat,
        seed=seed_for(room.benchmark.name, sample.item_id, repeat, room.config.seed_shift),
        prompt_sha256=prompt_sha256(prompt),
        answer="",
        reasoning="",
        finish_reason="",
        prompt_tokens=0,
        completion_tokens=0,
        reasoning_tokens=0,
        latency_s=0.0,
    )
    started = time.monotonic()
    if room.benchmark.converse is None:
        attempt, _ = await _ask_once(room, sample, blank, prompt, model)
    else:
        steps = room.benchmark.converse(sample, room.config.options)
        attempt = await _converse(room, sample, blank, steps, model)
    return replace(
        attempt, latency_s=round(time.monotonic() - started, 4), ended=round(time.time(), 3)
    )


class _Step(NamedTuple):
    """A request's outcome, and the calls in it, which an attempt keeps in its answer only."""

    attempt: Attempt
    calls: tuple[ToolCall, ...] = ()


async def _ask_once(
    room: Room, sample: Sample, blank: Attempt, prompt: Prompt, model: Model
) -> _Step:
    most = max_tokens_for(prompt, room.max_tokens, room.endpoint.context_tokens)
    settings = _settings(room.benchmark, room.config, sample, blank.repeat, most)
    reply = await _try(room, model, prompt, settings)
    asked = replace(
        blank,
        max_tokens=most,
        error=reply.error,
        refused=reply.refused,
        retries=blank.retries + reply.retries,
    )
    if reply.output is None:
        return _Step(asked)
    return _Step(_with_output(asked, reply.output), _calls_of(reply.output))


async def _converse(
    room: Room, sample: Sample, blank: Attempt, steps: Steps, model: Model
) -> Attempt:
    """Ask step by step until the item has its answer, a request fails, or an answer is cut.

    Tokens are those of all steps together, the thoughts those of each, one after the other.
    """
    total, thoughts = blank, list[str]()
    prompt = await asyncio.to_thread(_next, steps, None)
    while isinstance(prompt, Conversation):
        before = replace(blank, retries=total.retries)
        step, calls = await _ask_once(room, sample, before, prompt, model)
        thoughts += [step.reasoning] if step.reasoning else []
        total = replace(
            step,
            answer="",
            reasoning="\n\n".join(thoughts),
            prompt_tokens=total.prompt_tokens + step.prompt_tokens,
            completion_tokens=total.completion_tokens + step.completion_tokens,
            reasoning_tokens=total.reasoning_tokens + step.reasoning_tokens,
        )
        if step.error is not None or step.finish_reason == "length":
            steps.close()
            return replace(total, answer=step.answer)
        prompt = await asyncio.to_thread(_next, steps, Reply(step.answer, calls))
    return replace(total, answer=prompt)


def _next(steps: Steps, reply: Reply | None) -> Conversation | str:
    """What a conversation asks next, or its answer; in a thread, since it may run programs."""
    try:
        return next(steps) if reply is None else steps.send(reply)
    except StopIteration as end:  # no exception of this kind may leave a thread
        return str(end.value)


@dataclass(frozen=True, slots=True)
class _Reply:
    output: ModelOutput | None
    error: str | None = None
    refused: bool = False
    retries: int = 0


async def _try(room: Room, model: Model, prompt: Prompt, settings: GenerateConfig) -> _Reply:
    """Ask until there is an answer, a refusal, or the retries are used up."""
    wait_s = FIRST_WAIT_S
    for retry in range(room.config.retries + 1):
        try:
            output = await _generate(model, prompt, settings)
        # The client raises a dozen unrelated types; all of them are this attempt's failure.
        except Exception as failure:
            status = _status_of(failure)
            message = explain(failure)
            if status in _REFUSALS:
                return _Reply(None, message, refused=True, retries=retry)
            if status in _SETUP_FAULTS:
                room.fault = message
                return _Reply(None, message, retries=retry)
            if retry == room.config.retries or room.fault is not None:
                return _Reply(None, message, retries=retry)
            await asyncio.sleep(wait_s * random.uniform(0.75, 1.25))
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)
        else:
            return _read_output(output, retry)
    raise AssertionError("the loop returns")


def _status_of(failure: BaseException) -> int | None:
    """HTTP status behind an exception or any of its causes."""
    seen: BaseException | None = failure
    while seen is not None:
        status = getattr(seen, "status_code", None)
        if isinstance(status, int):
            return status
        seen = seen.__cause__ or seen.__context__
    return None


def may_pass(failure: BaseException) -> bool:
    """Whether a server answered with a status that may pass by itself: it is busy or starting."""
    status = _status_of(failure)
    return status is not None and status not in (*_REFUSALS, *_SETUP_FAULTS)


def explain(failure: BaseException) -> str:
    """What went wrong, by the server's own words; never the prompt, which some messages repeat."""
    seen: BaseException | None = failure
    while seen is not None:
        said = getattr(seen, "provider_message", None)
        body = getattr(seen, "body", None)  # what the official client has parsed
        if not said and isinstance(body, dict):
            words = body.get("message")
            said = words and f"{words} (HTTP {_status_of(seen)})"
        if said:
            return str(said)[:500]
        last, seen = seen, seen.__cause__ or seen.__context__
    return f"{type(last).__name__}: {last}"[:500]


def _read_output(output: ModelOutput, retries: int) -> _Reply:
    """Tell an answer from the outputs that inspect-ai makes of a rejected prompt."""
    is_made_up = output.usage is None and output.stop_reason in ("model_length", "content_filter")
    if is_made_up or not output.choices:
        return _Reply(None, output.completion[:500] or "no choices", refused=True, retries=retries)
    return _Reply(output, retries=retries)


async def _generate(
    model: Model, prompt: Prompt, settings: GenerateConfig, tool_choice: str | None = None
) -> ModelOutput:
    """Send a prompt. A conversation goes as it is, past inspect-ai's own forms of messages."""
    if not isinstance(prompt, Conversation):
        return await model.generate([_message(prompt)], config=settings)
    body: dict[str, Any] = {"messages": list(prompt.messages)}
    if prompt.tools:
        body["tools"] = list(prompt.tools)
    if tool_choice is not None:
        body["tool_choice"] = tool_choice
    shown = ChatMessageUser(content="(the conversation is in the request's extra_body)")
    return await model.generate([shown], config=settings.model_copy(update={"extra_body": body}))


def _message(prompt: tuple[Text | Image, ...]) -> ChatMessageUser:
    if len(prompt) == 1 and not isinstance(prompt[0], Image):
        return ChatMessageUser(content=prompt[0].text)
    parts: list[Any] = [
        ContentImage(image=part.uri) if isinstance(part, Image) else ContentText(text=part.text)
        for part in prompt
    ]
    return ChatMessageUser(content=parts)


def _calls_of(output: ModelOutput) -> tuple[ToolCall, ...]:
    """The tool calls of an answer, with their arguments as they came (`provider`)."""
    calls = (output.choices[0].message.metadata or {}).get(TOOL_CALLS, ())
    return tuple(ToolCall(*call) for call in calls)


def _with_output(blank: Attempt, output: ModelOutput) -> Attempt:
    content = output.choices[0].message.content
    texts, thoughts = [content] if isinstance(content, str) else [], []
    for part in content if isinstance(content, list) else ():
        if part.type == "text":
            texts.append(part.text)
        elif part.type == "reasoning":
            thoughts.append(part.reasoning)
    answer = split_reasoning("".join(texts), "\n".join(thoughts))
    usage = output.usage
    is_cut = output.stop_reason in ("max_tokens", "model_length")
    row = asdict(blank)
    row.update(
        answer=answer.text,
        reasoning=answer.reasoning,
        finish_reason="length" if is_cut else output.stop_reason,
        prompt_tokens=usage.input_tokens if usage else 0,
        completion_tokens=usage.output_tokens if usage else 0,
        reasoning_tokens=(usage.reasoning_tokens or 0) if usage else 0,
    )
    return Attempt(**row)
