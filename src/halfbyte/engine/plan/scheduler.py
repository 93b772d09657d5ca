"""Which tokens run next: admit, chunk, batch, preempt. No torch.

`plan` chooses tokens, the caller runs the model on them, `advance` and `remove` note what became
of them. The rules, in order:

1. Every sequence that is generating gets its next token. If no block is free for one, the last
   running sequence in turn gives all of its blocks back and is computed again later (preemption).
2. What is left of the token budget goes to prompts, oldest first, in chunks, so that a long prompt
   never keeps the others from generating. The caller narrows the budget further to bound how much
   a prompt slows the others down (`pacing`).
3. New sequences are admitted in their turn, by priority and then by arrival, as long as blocks for
   all of their known tokens are free, plus one for each running sequence to grow into. Nobody
   overtakes a sequence that waits for blocks; one that waits for a prefix which another is just
   computing may be overtaken.

Proposals (`speculation`) take no blocks from any sequence: `reserve` gives them what `plan` left,
`trim` takes back the blocks of those that were not accepted. So between two steps a sequence holds
blocks for its known tokens and no more.
"""

import heapq
from bisect import insort
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from operator import attrgetter

from halfbyte.engine.plan.blocks import BlockPool
from halfbyte.engine.plan.pacing import Demand
from halfbyte.engine.plan.sequence import Sequence, Work

# The more urgent sequence first, then the one that came first.
_TURN = attrgetter("turn")
# Prompt tokens of a step beside answers; None = as many as fit.
PromptLimit = Callable[[Demand], int | None]
# Blocks ahead of what a sequence has computed that others wait for instead of computing them, too.
_PROMISED_BLOCKS = 64


class Scheduler:
    """The waiting and the running sequences, both in their turn: by priority, then arrival."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_sequences: int,
        max_batch_tokens: int,
        prefix_cache: bool = True,
        num_ahead: int = 0,
    ) -> None:
        """Schedule over a pool of blocks, at most `max_sequences` at once.

        `num_ahead` tokens behind a block belong to its digest: what a draft model keeps of a
        position depends on the token after it.
        """
        assert max_batch_tokens >= max_sequences, (
            f"{max_batch_tokens} tokens a step for {max_sequences} sequences"
        )
        self.pool = pool
        self.max_sequences = max_sequences
        self.max_batch_tokens = max_batch_tokens
        self.prefix_cache = prefix_cache
        self.num_ahead = num_ahead
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        # Chunks that are being computed over several steps; empty once one of them lost its blocks.
        self.carried: SequenceOf[Work] = ()
        self._free_slots = list(range(max_sequences))
        # Digest -> the running sequence that is about to compute it.
        self._promises: dict[bytes, Sequence] = {}

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.pool.block_tokens)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Alone it must fit into the pool at its greatest length."""
        insort(self.waiting, sequence, key=_TURN)

    def find(self, request_id: str) -> Sequence | None:
        for sequence in (*self.running, *self.waiting):
            if sequence.request.request_id == request_id:
                return sequence
        return None

    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def plan(self, limit: PromptLimit | None = None) -> list[Work]:
        """Choose the tokens of the next step: first one each of the generating, then prompts.

        limit  narrower budget for prompts; asked only while others generate
        """
        works = self._plan_decodes()
        if self.carried:
            return works
        budget = self.max_batch_tokens - len(works)
        if works and limit is not None and budget > 0:
            allowed = limit(self._demand(works, budget))
            budget = budget if allowed is None else min(budget, allowed)
        planned = {work.sequence.arrival for work in works}
        for sequence in self.running:
            is_open = sequence.arrival not in planned and not sequence.is_exhausted
            if budget > 0 and is_open:
                works.append(_chunk(sequence, budget))
                budget -= works[-1].count
        for sequence in list(self.waiting):
            if budget <= 0 or not self._free_slots:
                break
            if self._awaits_promise(sequence):
                continue
            if not self._admit(sequence):
                break
            works.append(_chunk(sequence, budget))
            budget -= works[-1].count
        return works

    def carry(self, works: SequenceOf[Work]) -> None:
        """Note that these chunks, just planned, will be computed over several steps.

        Until they are done (call `advance` on each then), or one of their sequences gives up its
        blocks, `plan` takes only the generating; `carried` is empty from then on.
        """
        assert not self.carried
        self.carried = works

    def can_run_ahead(self) -> bool:
        """Whether a step can be planned before the last one's tokens are known.

        True where no sequence would have to give up its blocks.
        """
        return self.pool.num_free >= len(self.running)

    def advance(self, work: Work) -> None:
        """Note that the tokens of `work` are computed. Call before a new token is appended."""
        if work in self.carried:
            self.carried = ()
        self.begin(work)
        self.publish(work)

    def begin(self, work: Work) -> None:
        """Note that the tokens of `work` are being computed: what is planned next comes after."""
        work.sequence.num_computed = work.start + work.count

    def publish(self, work: Work) -> None:
        """Let others find the blocks that `work` filled; its tokens are all known."""
        if not self.prefix_cache:
            return
        sequence = work.sequence
        block_tokens = self.pool.block_tokens
        # A block whose end was computed before the tokens behind it were known comes late.
        first = max(work.start - self.num_ahead, 0) // block_tokens
        last = (work.start + work.count) // block_tokens
        if first == last:
            return
        sequence.extend_digests(block_tokens, self.num_ahead, last)
        for index in range(first, min(last, len(sequence.digests))):
            digest = sequence.digests[index]
            self.pool.publish(sequence.blocks[index], digest)
            if self._promises.get(digest) is sequence:
                del self._promises[digest]
                sequence.promised.remove(digest)
        self._promise(sequence, last)

    def reserve(self, sequence: Sequence, num_tokens: int) -> int:
        """Allocate blocks for `num_tokens` behind the known ones; returns how many got room.

        Call between `plan` and `trim`, for a sequence that `plan` chose.
        """
        known, block_tokens = len(sequence.token_ids), self.pool.block_tokens
        missing = self.num_blocks_for(known + num_tokens) - len(sequence.blocks)
        missing = min(missing, self.pool.num_free)
        if missing > 0:
            sequence.blocks.extend(self.pool.allocate(missing))
        return min(num_tokens, len(sequence.blocks) * block_tokens - known)

    def trim(self, sequence: Sequence) -> None:
        """Give back the blocks behind the known tokens, where no proposal was accepted."""
        kept = self.num_blocks_for(len(sequence.token_ids))
        if sequence.slot is None or len(sequence.blocks) <= kept:
            return
        self.pool.release(sequence.blocks[kept:])
        del sequence.blocks[kept:]
        sequence.num_tabled = min(sequence.num_tabled, kept)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, finished or given up, in whatever state it is."""
        if sequence.slot is None:
            self.waiting.remove(sequence)
        else:
            self._leave(sequence)

    def _demand(self, decodes: SequenceOf[Work], budget: int) -> Demand:
        """How many prompt tokens the next step could compute.

        Waiting prompts count as a whole, though some of their blocks may be found.
        """
        generating = {work.sequence.arrival for work in decodes}
        reading = [
            sequence
            for sequence in self.running
            if sequence.arrival not in generating and not sequence.is_exhausted
        ]
        slots = len(self._free_slots)
        num_tokens = sum(sequence.num_uncomputed for sequence in reading)
        for sequence in self.waiting[:slots]:
            if num_tokens >= budget:
                break
            num_tokens += sequence.num_uncomputed
        depth = reading[0].num_computed if reading else 0
        first = next(iter((*reading, *self.waiting)), None)
        num_left = 0 if first is None else first.num_uncomputed
        num_prompts = len(reading) + len(self.waiting)
        return Demand(len(decodes), min(num_tokens, budget), depth, num_prompts, num_left)

    def _plan_decodes(self) -> list[Work]:
        works = []
        for sequence in list(self.running):
            # `slot` is None once an older sequence has preempted this one.
            if sequence.slot is None or not sequence.is_decoding or sequence.is_exhausted:
                continue
            if self._grow(sequence):
                works.append(Work(sequence, sequence.num_computed, 1))
        return works

    def _grow(self, sequence: Sequence) -> bool:
        """Give a sequence the block of its last token; False if it lost its own blocks instead."""
        missing = self.num_blocks_for(len(sequence.token_ids)) - len(sequence.blocks)
        while missing > self.pool.num_free:
            last = self.running[-1]
            self._preempt(last)
            if last is sequence:
                return False
        if missing > 0:
            sequence.blocks.extend(self.pool.allocate(missing))
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preemptions += 1
        self._leave(sequence)
        sequence.num_computed = 0
        insort(self.waiting, sequence, key=_TURN)

    def _reusable_digests(self, sequence: Sequence) -> Iterator[bytes]:
        """Digests of the blocks that may come from the cache: at least one token is computed.

        Each is computed when it is asked for: all of a long prompt's at once would hold up a step.
        """
        if not self.prefix_cache or sequence.wants_prompt_logprobs:
            return
        block_tokens = self.pool.block_tokens
        limit = (len(sequence.token_ids) - 1) // block_tokens
        yield from sequence.digests[:limit]
        for index in range(len(sequence.digests), limit):
            sequence.extend_digests(block_tokens, self.num_ahead, index + 1)
            if index == len(sequence.digests):
                return
            yield sequence.digests[index]

    def _awaits_promise(self, sequence: Sequence) -> bool:
        """Whether another sequence is computing the next block that this one lacks."""
        if not self._promises:
            return False
        digests = self._reusable_digests(sequence)
        lacking = next((digest for digest in digests if not self.pool.knows(digest)), None)
        return lacking in self._promises

    def _promise(self, sequence: Sequence, first: int) -> None:
        """Let others wait for the blocks from `first` on, which this sequence will compute."""
        last = first + _PROMISED_BLOCKS
        sequence.extend_digests(self.pool.block_tokens, self.num_ahead, last)
        for digest in sequence.digests[first:last]:
            if self._promises.setdefault(digest, sequence) is sequence:
                sequence.promised.add(digest)

    def _admit(self, sequence: Sequence) -> bool:
        found = self.pool.find(self._reusable_digests(sequence))
        num_new = self.num_blocks_for(len(sequence.token_ids)) - len(found)
        # Without room to grow, the newcomer would be the next to be preempted.
        if not self.pool.can_hold(found, num_new + len(self.running)):
            return False
        self.pool.hold(found)
        sequence.blocks = [*found, *self.pool.allocate(num_new)]
        sequence.num_computed = len(found) * self.pool.block_tokens
        sequence.num_tabled = 0
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.num_computed
        if self.prefix_cache:
            self._promise(sequence, len(found))
        sequence.slot = heapq.heappop(self._free_slots)
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=_TURN)
        return True

    def _leave(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        if any(work.sequence is sequence for work in self.carried):
            self.carried = ()
        self.running.remove(sequence)
        heapq.heappush(self._free_slots, sequence.slot)
        sequence.slot = None
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        for digest in sequence.promised:
            if self._promises.get(digest) is sequence:
                del self._promises[digest]
        sequence.promised.clear()

    def check(self, other_holders: Iterable[list[int]] = ()) -> None:
        """Recompute slots, promises and block counts from the sequences and assert they agree.

        other_holders  block lists held by somebody else than a sequence
        """
        self.pool.check([*(sequence.blocks for sequence in self.running), *other_holders])
        for sequences in (self.running, self.waiting):
            turns = [sequence.turn for sequence in sequences]
            assert turns == sorted(set(turns)), f"not in their turn: {turns}"
        slots = [sequence.slot for sequence in self.running]
        assert None not in slots and len(set(slots)) == len(slots), f"slots {slots}"
        assert set(slots) | set(self._free_slots) == set(range(self.max_sequences))
        assert len(slots) + len(self._free_slots) == self.max_sequences
        for sequence in self.waiting:
            assert sequence.slot is None and not sequence.blocks and sequence.num_computed == 0
        for sequence in self.running:
            computed, known = sequence.num_computed, len(sequence.token_ids)
            assert computed < known, f"{computed} of {known} tokens computed: nothing left to run"
            have = len(sequence.blocks)
            assert self.num_blocks_for(computed) <= have <= self.num_blocks_for(known), (
                f"{have} blocks for {computed} computed of {known} tokens"
            )
        for work in self.carried:
            assert work.sequence.slot is not None and work.start == work.sequence.num_computed
        for digest, sequence in self._promises.items():
            assert sequence.slot is not None and digest in sequence.promised


def _chunk(sequence: Sequence, budget: int) -> Work:
    return Work(sequence, sequence.num_computed, min(sequence.num_uncomputed, budget))
