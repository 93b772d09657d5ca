"""The engine as a Python program uses it: prompts in, answers out, in this process.

The package offers it as `halfbyte.Engine` and imports this file when it is first used. The server
does not come through here: it needs limits, many clients at once and a process that lasts.
"""

import itertools
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self, TypeAlias

import torch

from halfbyte.chat.prompt import ControlTokens, EncodedPrompt, banned_control_ids, banned_in_text
from halfbyte.chat.router import Content, Delta, Reasoning, Router
from halfbyte.chat.tokens import load_chat
from halfbyte.engine.config import EngineConfig
from halfbyte.engine.core import Engine as TokenEngine
from halfbyte.engine.generate import Generated
from halfbyte.engine.request import (
    Event,
    FinishReason,
    GenerationRequest,
    ImageInput,
    SamplingParams,
    TokenLogprobs,
    TokensEvent,
)
from halfbyte.errors import RequestError, UsageError
from halfbyte.server.defaults import read_sampling

Messages: TypeAlias = Sequence[Mapping[str, Any]]
TokenIds: TypeAlias = Sequence[int]
Prompt: TypeAlias = str | Messages | TokenIds
AnswerPiece: TypeAlias = Content | Reasoning


@dataclass(frozen=True, slots=True)
class Answer:
    """One finished answer: its text, its tokens and how it ended.

    text           what the model said, without its thought
    reasoning      its thought, if it marked one
    token_ids      all its tokens, without the one that ended it
    finish_reason  "stop" (the model or a stop string ended it), "length" or "abort"
    prompt_tokens  tokens of the prompt
    cached_tokens  of these, tokens that were found in the prefix cache
    logprobs       one for each token, if `SamplingParams.logprobs` asked for them
    """

    text: str
    reasoning: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(slots=True)
class _Running:
    """One answer in the making; its request leaves the engine as soon as `reason` is set."""

    request_id: str
    prompt_tokens: int
    router: Router
    generated: Generated = field(default_factory=Generated)
    said: list[AnswerPiece] = field(default_factory=list)
    num_shown: int = 0
    reason: FinishReason | None = None

    def take(self, event: Event) -> None:
        self.generated.take(event)
        if isinstance(event, TokensEvent):
            for number, token_id in enumerate(event.token_ids, 1):
                self._say(self.router.feed(token_id))
                if self.router.stopped_by is not None:
                    self.reason = "stop"
                    surplus = len(event.token_ids) - number
                    kept = len(self.generated.token_ids) - surplus
                    del self.generated.token_ids[kept:], self.generated.logprobs[kept:]
                    return
        else:
            self.end(event.reason)

    def end(self, reason: FinishReason) -> None:
        self._say(self.router.finish())
        self.reason = reason

    def _say(self, deltas: Sequence[Delta]) -> None:
        """Add pieces to the answer; without tools a call arrives as content."""
        self.said += [delta for delta in deltas if isinstance(delta, Content | Reasoning)]

    def new(self) -> list[AnswerPiece]:
        """Pieces that were added since the last call of this method."""
        found, self.num_shown = self.said[self.num_shown :], len(self.said)
        return found

    def answer(self) -> Answer:
        assert self.reason is not None, "the answer has not ended"
        found = self.generated
        return Answer(
            text="".join(delta.text for delta in self.said if isinstance(delta, Content)),
            reasoning="".join(delta.text for delta in self.said if isinstance(delta, Reasoning)),
            token_ids=tuple(found.token_ids),
            finish_reason=self.reason,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=0 if found.finish is None else found.finish.cached_tokens,
            logprobs=tuple(found.logprobs),
        )


class Engine:
    """A checkpoint loaded into this process, ready to answer prompts.

        with halfbyte.Engine("mixed/", max_model_len=4096) as engine:
            [answer] = engine.generate([[{"role": "user", "content": "Why is the sky blue?"}]])
            print(answer.text)

    A prompt is a text, which the model continues (as /v1/completions does); a list of messages in
    OpenAI's form, which it answers as an assistant; or token ids, which it continues. Images of
    messages are {"type": "image", "image": PIL image}.

    Not safe for use from several threads at once: for that, and for other programs, there is
    `halfbyte serve`.
    """

    def __init__(
        self, directory: str | Path, config: EngineConfig | None = None, **options: Any
    ) -> None:
        """Load a checkpoint and make its KV cache, on a GPU if there is one.

        directory  of a checkpoint that `halfbyte quantize` or `halfbyte import` wrote, or any other
                   that `halfbyte inspect` reads
        config     how to run it; None takes the defaults, on a GPU if there is one
        options    fields of EngineConfig by name, over `config`

        Raises UsageError for an unknown option, CheckpointError, or CapacityError where the memory
        does not suffice.
        """
        known = {one.name for one in fields(EngineConfig)}
        if unknown := sorted(set(options) - known):
            raise UsageError(
                f"an engine has no option {unknown[0]!r}; there are {', '.join(sorted(known))}"
            )
        if config is None:
            config = EngineConfig(device="cuda" if torch.cuda.is_available() else "cpu")
        self.chat = load_chat(directory)
        self.tokens = TokenEngine.load(directory, replace(config, **options))
        self.recommended = SamplingParams(**asdict(read_sampling(Path(directory))))
        vocabulary, num_rows = self.chat.vocabulary, self.tokens.vocab_size
        self._banned_in_text = banned_in_text(vocabulary, self.chat.image_layout, num_rows)
        self._banned_in_chat = (
            *range(vocabulary.size, num_rows),
            *banned_control_ids(vocabulary, self.chat.control, thinking=True, tools=False),
        )
        self._numbers = itertools.count()
        self._running: dict[str, _Running] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the engine's threads and processes; it answers nothing afterwards."""
        self.tokens.close()

    @property
    def config(self) -> EngineConfig:
        """The engine's configuration with every open value decided."""
        return self.tokens.config

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        """Token ids of a prompt, and its images. Raises RequestError saying what is wrong."""
        if isinstance(prompt, str):
            return self.chat.encode_prompt(prompt)
        items = list(prompt)
        if items and all(isinstance(item, Mapping) for item in items):
            return self.chat.encode(items)  # type: ignore[arg-type]  # all are messages
        if all(isinstance(item, int) and not isinstance(item, bool) for item in items):
            return EncodedPrompt(tuple(items))  # type: ignore[arg-type]  # all are ids
        raise RequestError(
            f"a prompt is a text, a list of messages or a list of token ids, not {prompt!r:.100}",
            param="prompt",
        )

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        stop: Sequence[str] = (),
    ) -> list[Answer]:
        """Answer prompts together; returns one answer for each, in their order.

        params  how tokens are chosen: one for all prompts, or one for each; None takes what the
                checkpoint's generation_config.json recommends
        stop    texts that end an answer; they are not part of it

        Raises RequestError for the first prompt that cannot be answered, and answers none then.
        """
        if isinstance(prompts, str):
            raise RequestError("give a list of prompts, not one text", param="prompts")
        chosen = self.recommended if params is None else params
        each = [chosen] * len(prompts) if isinstance(chosen, SamplingParams) else list(chosen)
        if len(each) != len(prompts):
            raise RequestError(
                f"{len(prompts)} prompts need as many params, or one for all; {len(each)} given",
                param="params",
            )
        started: list[_Running] = []
        try:
            for prompt, own in zip(prompts, each, strict=True):
                started.append(self._start(prompt, own, stop))
            while any(one.reason is None for one in started):
                self._step()
        finally:
            for one in started:
                self._leave(one)
        return [one.answer() for one in started]

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        stop: Sequence[str] = (),
    ) -> Generator[AnswerPiece, None, None]:
        """Answer one prompt piece by piece: `Content` and `Reasoning` as they become certain.

        Closing the iterator ends the answer. Several streams may be read in turns; their answers
        are computed together. Raises RequestError at the first piece.
        """
        one = self._start(prompt, self.recommended if params is None else params, stop)
        try:
            while True:
                yield from one.new()
                if one.reason is not None:
                    return
                self._step()
        finally:
            self._leave(one)

    def _start(self, prompt: Prompt, params: SamplingParams, stop: Sequence[str]) -> _Running:
        encoded = self.encode(prompt)
        is_chat = not isinstance(prompt, str) and bool(prompt) and isinstance(prompt[0], Mapping)
        control = self.chat.control if is_chat else ControlTokens()
        banned = self._banned_in_chat if is_chat else self._banned_in_text
        ends = () if params.ignore_eos else self.chat.vocabulary.eos_token_ids
        request = GenerationRequest(
            f"library-{next(self._numbers)}",
            encoded.token_ids,
            replace(
                params,
                banned_token_ids=(*params.banned_token_ids, *banned),
                stop_token_ids=(*params.stop_token_ids, *ends),
            ),
            images=tuple(
                ImageInput.of(image.pixels, image.offset, image.num_tokens)
                for image in encoded.images
            ),
        )
        self.tokens.add(request)
        router = Router(self.chat.vocabulary, control, stops=tuple(stop), live_calls=False)
        one = _Running(request.request_id, len(encoded.token_ids), router)
        self._running[request.request_id] = one
        return one

    def _step(self) -> None:
        """Compute one step and give each event to the answer that it belongs to."""
        for event in self.tokens.step():
            one = self._running.get(event.request_id)
            if one is None or one.reason is not None:
                continue  # aborted in this very step
            one.take(event)
            if one.router.stopped_by is not None:
                one.generated.finish = self.tokens.abort(one.request_id)

    def _leave(self, one: _Running) -> None:
        """Forget an answer, and end it if it still runs."""
        self._running.pop(one.request_id, None)
        if one.reason is None:
            self.tokens.abort(one.request_id)
