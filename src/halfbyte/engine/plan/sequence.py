"""The state of a request while the engine works on it. No torch.

Index ranges of `token_ids`, prompt and answer in one list:

    0 ....... cached_tokens ...... num_computed ........ len(token_ids)
    | found in the   | K and V written    | known, K and V   |
    | prefix cache   | by this sequence   | not yet written  |

`blocks[i]` holds positions i * block_tokens up to (i + 1) * block_tokens. While an answer is being
generated, exactly one token is known but not computed: the last. After a preemption the whole list
is uncomputed again.

An engine that launches a step before it has read the last one's tokens keeps a place for each of
them at the end of the list (`reserve`), `num_pending` in number, and fills it later (`settle`).
"""

from collections import Counter
from dataclasses import dataclass

from halfbyte.engine.plan.blocks import ROOT_DIGEST, block_digest
from halfbyte.engine.request import GenerationRequest

# Stands for a token that is not read yet.
UNKNOWN = -1


class Sequence:
    """One running or waiting request; changed by the scheduler and, when a token comes, by core."""

    __slots__ = (
        "arrival",
        "blocks",
        "cached_tokens",
        "counts",
        "digests",
        "has_prompt_logprobs",
        "is_finished",
        "max_tokens",
        "num_computed",
        "num_pending",
        "num_prompt",
        "num_tabled",
        "pending_row",
        "promised",
        "request",
        "seed",
        "slot",
        "stop_token_ids",
        "token_ids",
        "turn",
    )

    def __init__(
        self, request: GenerationRequest, *, arrival: int, seed: int, max_tokens: int
    ) -> None:
        self.request = request
        self.arrival = arrival
        # The less, the sooner: whose blocks are short gives way from the end.
        self.turn = (request.priority, arrival)
        self.seed = seed
        self.max_tokens = max_tokens
        # Looked up for every token.
        self.stop_token_ids = frozenset(request.params.stop_token_ids)
        self.token_ids = list(request.prompt_token_ids)
        self.num_prompt = len(self.token_ids)
        self.num_computed = 0
        self.blocks: list[int] = []
        # Digests of the leading full blocks, as far as computed.
        self.digests: list[bytes] = []
        # Digests that this running sequence is going to publish; others wait for them.
        self.promised: set[bytes] = set()
        # Prompt tokens found in the cache at the first admission; None before it.
        self.cached_tokens: int | None = None
        # Place among the running sequences, below max_sequences; None while waiting.
        self.slot: int | None = None
        # Blocks already written into the slot's row of the page table (`step`).
        self.num_tabled = 0
        # Prompt log-probs are reported once, also if a preemption repeats the prompt.
        self.has_prompt_logprobs = False
        # Tokens at the end of the list that are chosen on the device and not read yet; the last of
        # them is at `pending_row` of the step that chose it.
        self.num_pending = 0
        self.pending_row = 0
        self.is_finished = False
        # Occurrences in the answer, kept only where a penalty needs them.
        self.counts: Counter[int] | None = Counter() if request.params.has_penalties else None

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def num_settled(self) -> int:
        """Number of generated tokens whose ids are known."""
        return self.num_generated - self.num_pending

    @property
    def is_exhausted(self) -> bool:
        """Whether the answer ends with a reserved token, so that nothing more is to be computed."""
        return self.num_pending > 0 and self.num_generated >= self.max_tokens

    @property
    def num_uncomputed(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """Whether the last token is the only one that is not computed yet."""
        return self.num_uncomputed == 1

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.request.params.prompt_logprobs is not None and not self.has_prompt_logprobs

    def append(self, token_id: int) -> None:
        """Add one generated token whose id is known to the sequence."""
        self.token_ids.append(token_id)
        if self.counts is not None:
            self.counts[token_id] += 1

    def reserve(self, row: int) -> None:
        """Make room for a token that the running step chooses at its `row`."""
        self.token_ids.append(UNKNOWN)
        self.num_pending += 1
        self.pending_row = row

    def settle(self, token_id: int) -> None:
        """Give the oldest reserved place its token id."""
        assert self.num_pending > 0 and self.counts is None
        self.token_ids[-self.num_pending] = token_id
        self.num_pending -= 1

    def extend_digests(self, block_tokens: int, num_ahead: int, count: int) -> None:
        """Compute the digests of the first `count` blocks, as far as known tokens fill them.

        num_ahead  tokens behind a block that its content depends on; always the same number
        """
        num_known = len(self.token_ids) - self.num_pending
        count = min(count, (num_known - num_ahead) // block_tokens)
        while len(self.digests) < count:
            start = len(self.digests) * block_tokens
            stop = start + block_tokens + num_ahead
            parent = self.digests[-1] if self.digests else ROOT_DIGEST
            extra = self._image_marks(start, stop)
            self.digests.append(block_digest(parent, self.token_ids[start:stop], extra))

    def _image_marks(self, start: int, stop: int) -> bytes:
        """Which pixels lie behind the tokens of a block: digest and offset of every image in it."""
        marks = [
            image.digest + (image.offset - start).to_bytes(8, "little", signed=True)
            for image in self.request.images
            if image.offset < stop and image.offset + image.num_tokens > start
        ]
        return b"".join(marks)


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """Tokens [start, start + count) of one sequence, to be computed in the next step.

    proposals  guesses of the tokens behind the last known one; computed in the same step, so that
               the model can say whether it would have chosen them. Only where `is_last`
    """

    sequence: Sequence
    start: int
    count: int
    proposals: tuple[int, ...] = ()

    @property
    def num_rows(self) -> int:
        """Number of tokens of this work that the step computes."""
        return self.count + len(self.proposals)

    @property
    def is_last(self) -> bool:
        """Whether the step reaches the last known token, so that a next one can be chosen."""
        return self.start + self.count == len(self.sequence.token_ids)
