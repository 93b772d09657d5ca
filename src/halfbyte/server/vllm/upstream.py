"""vLLM behind our server: checked requests in its form, and its answers as pieces of ours.

Requests have passed every check of ours before they come here: limits, images (fetched, decoded
and sent on as PNG), schemas, context. vLLM listens on the loopback address only, with a key that is
made up at each start.
"""

import asyncio
import base64
import contextlib
import io
import json
import re
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import httpx
from PIL import Image

from halfbyte.chat.router import CallArguments, CallStart, Content, Delta, Reasoning
from halfbyte.chat.tools import OpeningBrace, with_missing_results
from halfbyte.engine.request import TokenLogprobs
from halfbyte.errors import CapacityError, RequestError
from halfbyte.server.api import wire
from halfbyte.server.api.completion import Choice, Job
from halfbyte.server.api.pieces import Piece, TokenEntry
from halfbyte.server.api.prepare import scored_alternatives
from halfbyte.server.defaults import SamplingDefaults
from halfbyte.server.vllm.command import VllmPlan

# Written by vLLM for a token when it is asked for ids.
_TOKEN_ID = "token_id:"


class VllmUpstream:
    """`Answers` of a vLLM: sends checked requests there and makes pieces of what it streams."""

    reads_messages = True

    def __init__(self, plan: VllmPlan, key: str) -> None:
        self._url = f"http://127.0.0.1:{plan.flags['port']}"
        self._headers = {"Authorization": f"Bearer {key}"}
        self._model = plan.flags["served-model-name"]
        self._marks = plan.thought_marks
        names = sorted(plan.control_names, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, names))) if names else None

    def check(self, request: wire.ChatRequest, *, is_begun: bool) -> None:
        """Refuse what vLLM's chat cannot do: beginnings under rules, log-probs of prompts."""
        if is_begun:
            raise RequestError(
                "prefix: vLLM would begin the response_format or the tool calls anew after it; "
                "send one without the other",
                param="messages",
                code="unsupported_parameter",
            )
        if request.prompt_logprobs is not None:
            raise RequestError(
                "prompt_logprobs: in front of vLLM only /v1/completions has them",
                param="prompt_logprobs",
                code="unsupported_parameter",
            )

    def abort(self, job: Job) -> None:
        """Raise RequestError: vLLM ends an answer only when whoever asked for it leaves."""
        raise RequestError(
            "an answer of vLLM ends when its client leaves, and not otherwise",
            code="unsupported_parameter",
        )

    def pieces(self, job: Job) -> AsyncGenerator[list[Piece], None]:
        """Pieces of all answers of a job, as vLLM streams them."""
        asked = job.request
        return (
            self._chat(asked, job)
            if isinstance(asked, wire.ChatRequest)
            else self._text(asked, job)
        )

    async def _chat(self, request: wire.ChatRequest, job: Job) -> AsyncGenerator[list[Piece], None]:
        body = {
            **_sampling(request, job),
            "model": self._model,
            "messages": await asyncio.to_thread(
                lambda: _with_data_urls(_guarded(_settled(job.messages), self._control))
            ),
            "max_completion_tokens": job.choices[0].request.params.max_tokens,
            **_guarded(_chat_options(request), self._control),
            # Marks of thoughts are taken out here, and so have to arrive.
            "skip_special_tokens": False if self._marks else None,
        }
        told_so_far = [_Told() for _ in job.choices]
        async with contextlib.aclosing(self._chunks("/v1/chat/completions", body)) as chunks:
            async for chunk in chunks:
                _note_usage(chunk, job)
                pieces = [
                    piece
                    for told in chunk.get("choices", ())
                    for piece in _chat_pieces(
                        told, job.choices[told["index"]], told_so_far[told["index"]], self._marks
                    )
                ]
                if pieces:
                    yield pieces

    async def _text(
        self, request: wire.CompletionRequest, job: Job
    ) -> AsyncGenerator[list[Piece], None]:
        # Prompts are sent as token ids.
        prompts = [choice.request.prompt_token_ids for choice in job.choices[:: request.n]]
        body = {
            **_sampling(request, job),
            "model": self._model,
            "prompt": [list(prompt) for prompt in prompts],
            "max_tokens": max(request.max_tokens, 1),
            "logprobs": request.logprobs,
            "add_special_tokens": False,
        }
        body["prompt_logprobs"] = scored_alternatives(request)
        if body["prompt_logprobs"] is not None:
            # Log-probs of prompts are not streamed.
            answer = self._whole("/v1/completions", body)
        else:
            answer = self._chunks("/v1/completions", body)
        async with contextlib.aclosing(answer) as chunks:
            async for chunk in chunks:
                _note_usage(chunk, job)
                pieces = [
                    piece
                    for told in chunk.get("choices", ())
                    for piece in _text_pieces(told, job.choices[told["index"]])
                ]
                if pieces:
                    yield pieces

    async def _chunks(
        self, path: str, body: dict[str, Any]
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Chunks of a stream. Closing the generator closes the connection."""
        options = {"include_usage": True, "continuous_usage_stats": False}
        body = {**body, "stream": True, "stream_options": options}
        with _explained():
            async with (
                self._client() as client,
                client.stream("POST", path, json=_present(body)) as response,
            ):
                if response.is_error:
                    raise _refusal(response.status_code, await response.aread())
                async for line in response.aiter_lines():
                    if not line.startswith("data:") or line[5:].strip() == "[DONE]":
                        continue
                    chunk = json.loads(line[5:])
                    if "error" in chunk:
                        raise _refusal(500, line[5:].encode())
                    yield chunk

    async def _whole(self, path: str, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        with _explained():
            async with self._client() as client:
                response = await client.post(path, json=_present(body))
        if response.is_error:
            raise _refusal(response.status_code, response.content)
        yield response.json()

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=self._url, headers=self._headers, trust_env=False, timeout=None
        )


# --- requests -------------------------------------------------------------------------------


def _sampling(request: wire.ChatRequest | wire.CompletionRequest, job: Job) -> dict[str, Any]:
    """Fields that both kinds have and vLLM calls the same, and the form that is to be held."""
    names = (
        "n", "presence_penalty", "frequency_penalty", "seed", "stop_token_ids", "logit_bias",
        "min_tokens", "ignore_eos",
    )  # fmt: skip
    body = {name: getattr(request, name) for name in names}
    # What the request left open is settled here: vLLM is told not to read the recommendation.
    params = job.choices[0].request.params
    for one in fields(SamplingDefaults):
        body[one.name] = getattr(params, one.name)
    body["stop"] = list(request.stops) or None
    for name in ("include_stop_str_in_output", "return_token_ids"):
        body[name] = getattr(request, name) or None
    body["return_tokens_as_token_ids"] = True
    form = request.response_format
    if isinstance(form, wire.RegexFormat):
        body["structured_outputs"] = {"regex": form.regex}
    elif isinstance(form, wire.ChoiceFormat):
        body["structured_outputs"] = {"choice": form.choices}
    elif isinstance(form, wire.GrammarFormat):
        body["structured_outputs"] = {"grammar": form.grammar}
    elif form is not None and not isinstance(form, wire.TextFormat):
        body["response_format"] = form.model_dump(by_alias=True, exclude_none=True)
    return body


def _chat_options(request: wire.ChatRequest) -> dict[str, Any]:
    options: dict[str, Any] = {
        "logprobs": request.logprobs or None,
        "top_logprobs": request.top_logprobs,
        "reasoning_effort": request.reasoning_effort,
        "thinking_token_budget": request.max_reasoning_tokens,
    }
    if request.tools:
        tools, choice = request.tools, request.tool_choice or "auto"
        if isinstance(choice, wire.AllowedTools):
            # vLLM has no such choice, and a tool that is not shown cannot be called.
            allowed = {tool.function.name for tool in choice.allowed_tools.tools}
            tools = [tool for tool in tools if tool.function.name in allowed]
            choice = choice.allowed_tools.mode
        options["tools"] = [tool.model_dump(exclude_none=True) for tool in tools]
        options["parallel_tool_calls"] = request.parallel_tool_calls
        options["tool_choice"] = choice if isinstance(choice, str) else choice.model_dump()
    if request.continues_final:
        options |= {"continue_final_message": True, "add_generation_prompt": False}
    return options


def _settled(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages with a result for each call, as our own formats have them."""
    return [dict(message) for _, message in with_missing_results(messages)]


def _with_data_urls(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as the API has them: decoded images become PNG again."""
    return [
        {**message, "content": [_part(part) for part in message["content"]]}
        if isinstance(message.get("content"), list)
        else message
        for message in messages
    ]


def _guarded(value: Any, control: re.Pattern[str] | None) -> Any:
    """The same with a word joiner in each name of a control token that somebody typed.

    A hub tokenizer finds such names in any text; a letter that is not seen keeps them text.
    """
    if control is None:
        return value
    if isinstance(value, str):
        return control.sub(lambda found: f"{found.group()[0]}\u2060{found.group()[1:]}", value)
    if isinstance(value, dict):
        return {_guarded(key, control): _guarded(one, control) for key, one in value.items()}
    if isinstance(value, list):
        return [_guarded(one, control) for one in value]
    return value


def _part(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] != "image":
        return part
    buffer = io.BytesIO()
    Image.fromarray(part["image"].transpose(1, 2, 0)).save(buffer, "PNG", compress_level=1)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def _present(body: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if value is not None}


# --- answers --------------------------------------------------------------------------------


@dataclass(slots=True)
class _Told:
    """What the chunks of one choice have told so far.

    num_calls  tool calls that have begun
    brace      of the arguments of the last one
    shown      what the last text was a part of; None before any
    held       log-probs of tokens that no text has come of yet: a part of a character, say
    token_ids  tokens that no piece has told of yet
    """

    num_calls: int = 0
    brace: OpeningBrace = field(default_factory=OpeningBrace)
    is_thinking: bool = False
    shown: type[Delta] | None = None
    held: tuple[TokenEntry, ...] = ()
    token_ids: tuple[int, ...] = ()

    def take_token_ids(self) -> tuple[int, ...]:
        token_ids, self.token_ids = self.token_ids, ()
        return token_ids


def _chat_pieces(
    told: Mapping[str, Any], choice: Choice, so_far: _Told, marks: tuple[str, str] | None
) -> Iterator[Piece]:
    """Pieces of one choice of a chunk. With `marks`, thoughts are among the content.

    Log-probs are those of the content. A chunk without text may be a part of anything: its entries
    wait for the text that follows, and for the end where none does.
    """
    delta = told.get("delta") or {}
    entries = so_far.held + _chat_entries(told, choice)
    so_far.held = ()
    so_far.token_ids += tuple(told.get("token_ids") or ())
    found: list[Delta] = []
    thought = delta.get("reasoning") or delta.get("reasoning_content")
    if thought:
        found.append(Reasoning(thought))
    text = delta.get("content") or ""
    found += _thought_and_content(text, so_far, marks)
    choice.shown_chars += sum(len(one.text) for one in found if isinstance(one, Content))
    for call in delta.get("tool_calls") or ():
        function = call.get("function") or {}
        if function.get("name") and call["index"] >= so_far.num_calls:
            so_far.num_calls = call["index"] + 1
            so_far.brace = OpeningBrace()
            found.append(CallStart(call["index"], call["id"], function["name"]))
        if arguments := so_far.brace.feed(function.get("arguments") or ""):
            found.append(CallArguments(call["index"], arguments))
    for one in found:
        so_far.shown = type(one)
        kept = entries if isinstance(one, Content) else ()
        yield Piece(choice.index, one, kept, token_ids=so_far.take_token_ids())
    if not found:
        so_far.held = entries
    if told.get("finish_reason"):
        reason = told["finish_reason"]
        if so_far.num_calls and reason == "stop":
            reason = "tool_calls"
        choice.reason = reason
        is_content = so_far.shown in (None, Content)
        held = so_far.held if is_content else ()
        yield Piece(choice.index, None, held, reason, so_far.take_token_ids())


def _thought_and_content(
    text: str, so_far: _Told, marks: tuple[str, str] | None
) -> Iterator[Delta]:
    """Text as what it is, split at control tokens, each of which comes whole in one chunk."""
    while text:
        before, mark, text = text.partition(marks[so_far.is_thinking]) if marks else (text, "", "")
        if before:
            yield Reasoning(before) if so_far.is_thinking else Content(before)
        so_far.is_thinking ^= bool(mark)


def _text_pieces(told: Mapping[str, Any], choice: Choice) -> Iterator[Piece]:
    prompt = told.get("prompt_logprobs")
    if prompt:
        ids = choice.request.prompt_token_ids
        scored = zip(ids[1:], prompt[1:], strict=True)
        choice.prompt_logprobs = tuple(_prompt_entry(i, by_id) for i, by_id in scored)
    logprobs = told.get("logprobs")
    entries: tuple[TokenEntry, ...] = ()
    if logprobs:
        rows = zip(
            logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
        )
        entries = tuple(
            TokenEntry(
                TokenLogprobs(
                    _token_id(token),
                    value,
                    tuple((_token_id(name), score) for name, score in (top or {}).items()),
                ),
                choice.shown_chars,
            )
            for token, value, top in rows
        )
    token_ids = tuple(told.get("token_ids") or ())
    if told.get("text") or entries or token_ids:
        text = told.get("text") or ""
        yield Piece(choice.index, Content(text), entries, token_ids=token_ids)
        choice.shown_chars += len(text)
    if told.get("finish_reason"):
        choice.reason = told["finish_reason"]
        yield Piece(choice.index, None, (), told["finish_reason"])


def _chat_entries(told: Mapping[str, Any], choice: Choice) -> tuple[TokenEntry, ...]:
    """Log-probs of a chunk's tokens, but for those that mark thoughts and calls."""
    rows = (told.get("logprobs") or {}).get("content") or ()
    return tuple(
        TokenEntry(
            TokenLogprobs(
                _token_id(row["token"]),
                row["logprob"],
                tuple((_token_id(top["token"]), top["logprob"]) for top in row["top_logprobs"]),
            ),
            choice.shown_chars,
        )
        for row in rows
        if not choice.router.is_mark(_token_id(row["token"]))
    )


def _prompt_entry(token_id: int, by_id: Mapping[str, Any]) -> TokenLogprobs:
    scores = {int(key): float(value["logprob"]) for key, value in by_id.items()}
    ranked = sorted(by_id.items(), key=lambda item: item[1]["rank"])
    top = tuple((int(key), scores[int(key)]) for key, _ in ranked)
    return TokenLogprobs(token_id, scores[token_id], top)


def _token_id(name: str) -> int:
    return int(name.removeprefix(_TOKEN_ID))


def _note_usage(chunk: Mapping[str, Any], job: Job) -> None:
    told = chunk.get("usage")
    if not told:
        return
    usage = job.usage
    usage.prompt_tokens = told["prompt_tokens"]
    usage.completion_tokens = told.get("completion_tokens") or 0
    usage.cached_tokens = (told.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    details = told.get("completion_tokens_details") or {}
    usage.reasoning_tokens = details.get("reasoning_tokens") or 0
    # For the log, which adds the choices up.
    job.choices[0].num_tokens = usage.completion_tokens


# --- failures -------------------------------------------------------------------------------


def _refusal(status: int, body: bytes) -> RequestError:
    """vLLM's refusal in our words: a client's mistake stays one, all else is the engine's."""
    try:
        told = json.loads(body)
    except ValueError:
        told = {}
    told = told.get("error", told) if isinstance(told, dict) else {}
    told = told if isinstance(told, dict) else {}
    message = str(told.get("message") or f"vLLM answered {status}")
    if status in (400, 404, 413, 422):
        param = told.get("param")
        return RequestError(message, param=str(param) if param else None, code="refused_by_engine")
    if status in (429, 503):
        return RequestError(message, code="queue_full", status=status)
    return RequestError(message, code="engine_error", status=500)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except httpx.HTTPError as error:
        raise CapacityError(f"vLLM does not answer ({type(error).__name__}); try again") from error
