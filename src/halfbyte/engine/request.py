"""What comes into the engine and what goes out: requests, sampling parameters, events. No torch.

The server builds `GenerationRequest`, the engine answers with `Event`s. The state of a request
while it runs is in `sequence`.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from halfbyte.errors import RequestError

FinishReason = Literal["stop", "length", "abort", "error"]

# Below it a draw is greedy: the second best token would need a logit within a few thousandths of a
# thousandth of the best one's, and what is 0 in f32 would divide by it.
MIN_TEMPERATURE = 1e-5

# Alternatives a client may ask for at a position; OpenAI's limit.
MAX_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one answer are chosen, and when it ends.

    max_tokens           most tokens to generate; None = what the context leaves
    temperature          0, or less than MIN_TEMPERATURE, takes the most likely token (greedy)
    top_p, top_k, min_p  1.0, 0 and 0.0 switch them off; they apply after the temperature, top_k
                         first, then top_p, then min_p (a share of the largest probability)
    presence_penalty, frequency_penalty
                         subtracted once, and per occurrence, from logits of generated tokens
    repetition_penalty   divides positive and multiplies negative logits of tokens of the prompt
                         and the answer
    seed                 same seed, same request: same tokens, whatever else is in the batch;
                         None = a fresh seed
    logprobs             number of most likely alternatives to report at each generated token
                         (0 = the token itself only); None = none. They are of the model's own
                         distribution: before temperature, penalties, bias and masks
    prompt_logprobs      the same for the prompt
    logit_bias           token id -> added to its logit
    banned_token_ids     never generated
    stop_token_ids       end the answer, in addition to the model's own ends
    ignore_eos           the model's own ends do not end the answer
    min_tokens           no end of either kind before this many tokens
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    banned_token_ids: tuple[int, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken and nothing is drawn."""
        return self.temperature < MIN_TEMPERATURE

    @property
    def has_penalties(self) -> bool:
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
        )

    def validate(self, vocab_size: int) -> None:
        """Raise RequestError naming the first parameter that is out of range."""
        limits: tuple[tuple[str, float | None, float, float], ...] = (
            ("max_tokens", self.max_tokens, 1, math.inf),
            ("temperature", self.temperature, 0.0, 100.0),
            ("top_p", self.top_p, 0.0, 1.0),
            ("top_k", self.top_k, 0, math.inf),
            ("min_p", self.min_p, 0.0, 1.0),
            ("presence_penalty", self.presence_penalty, -2.0, 2.0),
            ("frequency_penalty", self.frequency_penalty, -2.0, 2.0),
            ("repetition_penalty", self.repetition_penalty, 0.01, 100.0),
            ("seed", self.seed, -(2**63), 2**64 - 1),
            ("logprobs", self.logprobs, 0, min(MAX_LOGPROBS, vocab_size)),
            ("prompt_logprobs", self.prompt_logprobs, 0, min(MAX_LOGPROBS, vocab_size)),
            ("min_tokens", self.min_tokens, 0, self.max_tokens or math.inf),
        )
        for name, value, low, high in limits:
            # Written so that NaN fails.
            if value is not None and not low <= value <= high:
                raise RequestError(f"{name} is {value}; it must be in [{low}, {high}]", param=name)
        if self.top_p == 0.0:
            raise RequestError("top_p is 0; it must be above 0", param="top_p")
        for name, ids in (
            ("logit_bias", self.logit_bias),
            ("banned_token_ids", self.banned_token_ids),
            ("stop_token_ids", self.stop_token_ids),
        ):
            for token_id in ids:
                if not 0 <= token_id < vocab_size:
                    message = f"{name}: token id {token_id} is outside the {vocab_size} known ones"
                    raise RequestError(message, param=name)
        for token_id, bias in self.logit_bias.items():
            if not -100.0 <= bias <= 100.0:
                message = f"logit_bias of token {token_id} is {bias}; it must be in [-100, 100]"
                raise RequestError(message, param="logit_bias")


class TokenMask(Protocol):
    """Which tokens may come next: a grammar, a budget, a forced sequence.

    Belongs to one request. `fill` or `allows` before a token is chosen, then `accept` with the
    token, in order, once a token; never again after `is_finished`. One call at a time, from a
    thread of the engine: `fill` runs beside the model.
    """

    def allows(self, token_id: int) -> bool:
        """Whether this token may come next; False also where only `fill` can tell.

        Everything that `fill` sets is right, but it may leave out tokens that this allows: where a
        grammar leaves one text to say, all but one way to cut it into tokens.
        """
        ...

    def fill(self, bitmask: NDArray[np.uint32]) -> None:
        """Set bit i % 32 of word i // 32 for each allowed token i; clear all others.

        bitmask  uint32 (ceil(V / 32),), content undefined on entry. At least one bit must be set.
        """
        ...

    def accept(self, token_id: int) -> None:
        """Advance past a token that `allows` or the last `fill` allowed."""
        ...

    def is_finished(self) -> bool:
        """Whether nothing may follow: the answer then ends with reason "stop"."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class ImageInput:
    """One image of a prompt, its tokens already in the prompt.

    pixels      uint8 (3, height, width), RGB; normalized only on their way into the encoder
    offset      index in the prompt of the image's first token
    num_tokens  tokens of the image, row breaks and the end included
    digest      identifies the pixels; prefixes with other pixels are never shared
    """

    pixels: NDArray[np.uint8]
    offset: int
    num_tokens: int
    digest: bytes

    @classmethod
    def of(cls, pixels: NDArray[np.uint8], offset: int, num_tokens: int) -> "ImageInput":
        """An image with the digest of its pixels and shape."""
        content = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=16)
        content.update(np.ascontiguousarray(pixels).data)
        return cls(pixels, offset, num_tokens, content.digest())


@dataclass(frozen=True, slots=True, eq=False)
class GenerationRequest:
    """One answer to generate. `request_id` is unique among the running ones.

    For `n` answers to one prompt send n requests: with the prefix cache on they share the
    blocks of the prompt, also when they arrive together.

    mask      what holds the answer, where the engine runs
    rules     what its mask is made of there; for whoever hosts the engine (`host`), not for it
    priority  the less, the sooner it is admitted and the later it gives way; equal ones in order
              of arrival
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    mask: TokenMask | None = None
    images: tuple[ImageInput, ...] = ()
    priority: int = 0
    rules: object | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural log of a token's probability, and the most likely tokens there, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        # Events cross a process boundary at every step: by fields, a third of the time.
        return TokenLogprobs, (self.token_id, self.logprob, self.top)


@dataclass(frozen=True, slots=True)
class TokensEvent:
    """New tokens of an answer, at least one; the token that ends an answer is never among them.

    logprobs         one for each token, or None if not asked for
    prompt_logprobs  with the first event of a request that asked for them: one for each prompt
                     token but the first, which has no distribution (the event may then hold no
                     tokens)
    """

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        fields = (self.request_id, self.token_ids, self.logprobs, self.prompt_logprobs)
        return TokensEvent, fields


@dataclass(frozen=True, slots=True)
class FinishEvent:
    """The last event of a request: how its answer ended.

    stop_token_id      the token that ended it (an end of the model or a stop token), if one did
    cached_tokens      prompt tokens found in the prefix cache when it was first admitted
    completion_tokens  generated tokens, the ending one included
    message            what went wrong, for reason "error"
    stop_logprobs      those of `stop_token_id`, where log-probs were asked for
    mask_problem       why the mask could not be followed to its end; None if it could
    """

    request_id: str
    reason: FinishReason
    stop_token_id: int | None
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    message: str | None = None
    stop_logprobs: TokenLogprobs | None = None
    mask_problem: str | None = None


Event = TokensEvent | FinishEvent
