"""The scheduler against a model of itself: blocks are memory that remembers what was written."""

import hashlib
from collections.abc import Sequence as SequenceOf
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from halfbyte.engine.plan.blocks import BlockPool
from halfbyte.engine.plan.scheduler import Scheduler
from halfbyte.engine.plan.sequence import Sequence, Work
from halfbyte.engine.request import GenerationRequest, ImageInput, SamplingParams

VOCAB = 3


def next_token(prefix: SequenceOf[int]) -> int:
    """A model whose every token depends on the whole prefix."""
    return hashlib.blake2b(bytes(prefix), digest_size=1).digest()[0] % VOCAB


class Machine:
    """Runs what the scheduler plans; every slot of every block remembers the prefix it holds."""

    def __init__(self, **options: int | bool) -> None:
        num_blocks = int(options.pop("num_blocks", 8))
        self.pool = BlockPool(num_blocks, 2)
        # Unless told otherwise, what the scheduler does by itself.
        chosen = {name: bool(options.pop(name)) for name in ("prefix_cache",) if name in options}
        self.scheduler = Scheduler(
            self.pool,
            max_sequences=int(options.pop("max_sequences", 3)),
            max_batch_tokens=int(options.pop("max_batch_tokens", 5)),
            num_ahead=int(options.pop("num_ahead", 0)),
            **chosen,
        )
        # What a draft model keeps of a position: also the token behind it.
        self.entries: dict[tuple[int, int], tuple[int, ...]] = {}
        assert not options
        self.memory: dict[tuple[int, int], tuple[int, ...]] = {}
        self.answers: dict[str, list[int]] = {}
        self.num_added = 0
        self.num_computed_tokens = 0
        self.num_confirmed = 0

    def add(
        self,
        prompt: SequenceOf[int],
        max_tokens: int,
        images: tuple[ImageInput, ...] = (),
        params: SamplingParams | None = None,
        priority: int = 0,
    ) -> Sequence:
        request = GenerationRequest(
            str(self.num_added),
            tuple(prompt),
            params or SamplingParams(),
            images=images,
            priority=priority,
        )
        sequence = Sequence(request, arrival=self.num_added, seed=0, max_tokens=max_tokens)
        self.num_added += 1
        self.scheduler.add(sequence)
        return sequence

    def step(
        self, max_prefill_tokens: int | None = None, guesses: SequenceOf[bool] = ()
    ) -> list[Work]:
        """Run what is planned. `guesses` are made behind every generating sequence, True a right
        one, as many as blocks allow.
        """
        works = [
            self.propose(work, guesses)
            for work in self.scheduler.plan(lambda _: max_prefill_tokens)
        ]
        lasts = [work.is_last for work in works]
        blocks_of = [list(work.sequence.blocks) for work in works]
        for work in works:
            self.write(work)
        for work, is_last in zip(works, lasts, strict=True):
            self.scheduler.advance(work)
            if is_last:
                self.grow(work.sequence)
                self.confirm(work)
        if self.scheduler.num_ahead:
            for work, blocks in zip(works, blocks_of, strict=True):
                self.follow(work, blocks)
        return works

    def follow(self, work: Work, blocks: list[int]) -> None:
        """Write a draft model's entries as `drafter` does; those before must be right."""
        tokens = tuple(work.sequence.token_ids)
        stop = min(work.sequence.num_computed, len(tokens) - 1)
        for position in range(work.start, stop):
            self.entries[blocks[position // 2], position % 2] = tokens[: position + 2]
        for position in range(stop):
            stored = self.entries[blocks[position // 2], position % 2]
            assert stored == tokens[: position + 2], f"entry {position} holds {stored}"

    def propose(self, work: Work, guesses: SequenceOf[bool]) -> Work:
        if not (work.is_last and work.count == 1 and work.sequence.num_generated and guesses):
            return work
        granted = self.scheduler.reserve(work.sequence, len(guesses))
        assert 0 <= granted <= len(guesses)
        tokens = list(work.sequence.token_ids)
        for is_right in guesses[:granted]:
            tokens.append((next_token(tokens) + (not is_right)) % VOCAB)
        return replace(work, proposals=tuple(tokens[len(work.sequence.token_ids) :]))

    def confirm(self, work: Work) -> None:
        """Go on while the proposals are what was chosen, as the engine does."""
        sequence = work.sequence
        for proposal in work.proposals:
            if sequence.slot is None or sequence.token_ids[-1] != proposal:
                break
            self.scheduler.advance(Work(sequence, sequence.num_computed, 1))
            self.num_confirmed += 1
            self.grow(sequence)
        self.scheduler.trim(sequence)

    def write(self, work: Work) -> None:
        sequence, tokens = work.sequence, (*work.sequence.token_ids, *work.proposals)
        self.num_computed_tokens += work.num_rows
        for position in range(work.start, work.start + work.num_rows):
            block = sequence.blocks[position // 2]
            self.memory[block, position % 2] = tokens[: position + 1]
        # What attention would read for the last token of the work.
        for position in range(work.start + work.num_rows):
            stored = self.memory[sequence.blocks[position // 2], position % 2]
            assert stored == tokens[: position + 1], f"position {position} holds {stored}"

    def grow(self, sequence: Sequence) -> None:
        sequence.append(next_token(sequence.token_ids))
        if sequence.num_generated >= sequence.max_tokens:
            self.scheduler.remove(sequence)
            answer = sequence.token_ids[sequence.num_prompt :]
            self.answers[sequence.request.request_id] = answer

    def run(self) -> None:
        for _ in range(1000):
            if not self.scheduler.has_work():
                return
            assert self.step(), "work is left but nothing was planned"
        raise AssertionError("never finished")


def expected(prompt: SequenceOf[int], max_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


def test_the_urgent_is_admitted_first_and_gives_way_last() -> None:
    machine = Machine(num_blocks=5, max_sequences=2)
    running = machine.add([0, 1, 2], 5, priority=5)
    machine.step()
    late, later = machine.add([3, 4], 2, priority=9), machine.add([4, 3], 2, priority=1)
    works = machine.step()
    # The pool has room for one more; the running one came first, and still is behind it in turn.
    assert later.slot is not None and late.slot is None
    assert [work.sequence for work in works] == [running, later]
    assert machine.scheduler.running == [later, running]
    machine.run()
    for sequence, length in ((running, 5), (late, 2), (later, 2)):
        prompt = sequence.request.prompt_token_ids
        assert machine.answers[sequence.request.request_id] == expected(prompt, length)


def test_decodes_come_first_and_a_prompt_gets_the_rest() -> None:
    machine = Machine(num_blocks=40, max_batch_tokens=5)
    first = machine.add([1], 9)
    machine.step()
    long = machine.add([0, 1] * 10, 1)
    works = machine.step()
    assert [(work.sequence, work.count) for work in works] == [(first, 1), (long, 4)]
    works = machine.step(max_prefill_tokens=2)
    assert [(work.sequence, work.count) for work in works] == [(first, 1), (long, 2)]


def test_prefill_limit_is_void_while_nothing_generates() -> None:
    machine = Machine(num_blocks=40, max_batch_tokens=5)
    machine.add([0, 1] * 10, 1)
    assert [work.count for work in machine.step(max_prefill_tokens=1)] == [5]


def test_long_prompt_never_starves_a_running_sequence() -> None:
    machine = Machine(num_blocks=80, max_batch_tokens=4)
    machine.add([1], 30)
    machine.step()
    machine.add([0] * 60, 1)
    for _ in range(19):
        assert any(work.sequence.arrival == 0 for work in machine.step())


def test_together_arriving_equal_prompts_are_computed_once() -> None:
    machine = Machine(num_blocks=40, max_sequences=4, max_batch_tokens=8)
    prompt = [0, 1, 2, 0, 1, 2, 2, 1, 0]
    for _ in range(3):
        machine.add(prompt, 1)
    machine.run()
    # Two of the nine prompt tokens' blocks are not full or hold the last token.
    assert machine.num_computed_tokens == 9 + 1 + 1
    assert machine.answers == {str(i): expected(prompt, 1) for i in range(3)}


@pytest.mark.parametrize("max_batch_tokens", [50, 300])
def test_a_long_prompt_is_promised_piece_by_piece(max_batch_tokens: int) -> None:
    """Digests of all its blocks at once would hold up the step that admits it."""
    machine = Machine(num_blocks=600, max_sequences=4, max_batch_tokens=max_batch_tokens)
    prompt = [0, 1, 2, 2, 1] * 80
    maker = machine.add(prompt, 1)
    machine.add(prompt, 1)
    machine.add([1, *prompt], 1)  # shares nothing
    num_waiting = 0
    while maker.slot is None or maker.num_uncomputed > max_batch_tokens:
        works = machine.step()
        known = maker.num_computed // 2
        assert known <= len(maker.digests) <= known + 64
        num_waiting += all(work.sequence.arrival != 1 for work in works)
    assert num_waiting > 0
    machine.run()
    assert machine.num_computed_tokens == 400 + 2 + 401
    assert machine.answers["0"] == machine.answers["1"] == expected(prompt, 1)


def test_who_waits_for_a_promised_prefix_holds_up_nobody_behind() -> None:
    machine = Machine(num_blocks=40, max_sequences=4, max_batch_tokens=20)
    maker = machine.add([0, 1, 2, 0, 1, 2, 2, 1, 0], 1)
    machine.add([0, 1, 2, 0, 1, 2, 2, 1, 0], 1)
    other = machine.add([1, 0, 0, 2, 1], 1)
    assert [work.sequence for work in machine.step()] == [maker, other]


def test_an_older_prompt_that_is_read_late_takes_no_step_from_the_generating() -> None:
    """It waited for a prefix; who came later generates already."""
    machine = Machine(num_blocks=60, max_sequences=4, max_batch_tokens=4)
    prefix = [0, 1, 2, 0, 1, 2]
    machine.add(prefix, 1)
    late = machine.add([*prefix, *[1] * 30], 1)
    generating = machine.add([1], 20)
    num_beside = 0
    while machine.scheduler.has_work():
        is_generating = generating.slot is not None and generating.is_decoding
        planned = [work.sequence for work in machine.step()]
        if is_generating and late in planned:
            assert generating in planned
            num_beside += 1
    assert num_beside > 2


def test_an_answer_that_is_complete_but_unread_holds_up_nobody() -> None:
    """Run ahead: its last token is reserved, nothing of it is to be computed any more."""
    machine = Machine(num_blocks=40, max_sequences=4, max_batch_tokens=20)
    done, other = machine.add([0, 1, 2], 2), machine.add([1, 0, 0], 5)
    machine.step()
    done.reserve(0)
    assert done.is_exhausted and not other.is_exhausted
    assert [work.sequence for work in machine.scheduler.plan()] == [other]


def test_waiting_for_a_promised_prefix_survives_the_abort_of_its_maker() -> None:
    machine = Machine(num_blocks=40, max_batch_tokens=3)
    prompt = [0, 1, 2, 0, 1, 2, 2, 1, 0]
    maker = machine.add(prompt, 1)
    machine.add(prompt, 2)
    machine.step()
    machine.scheduler.remove(maker)
    machine.scheduler.check()
    machine.run()
    assert machine.answers == {"1": expected(prompt, 2)}


def test_chunks_computed_over_several_steps_end_with_their_own_sequences_alone() -> None:
    machine = Machine(num_blocks=40, max_sequences=3, max_batch_tokens=8)
    generating, other = machine.add([1], 9), machine.add([2], 9)
    machine.step()
    reading = machine.add([0, 1, 2, 2, 1, 0], 1)
    chunks = [work for work in machine.scheduler.plan() if work.sequence is reading]
    machine.scheduler.carry(chunks)
    machine.scheduler.remove(other)
    assert machine.scheduler.carried is chunks
    assert [work.sequence for work in machine.scheduler.plan()] == [generating]
    machine.scheduler.remove(reading)
    assert not machine.scheduler.carried
    machine.scheduler.check()


def test_preempted_sequence_is_the_youngest_and_keeps_its_tokens() -> None:
    machine = Machine(num_blocks=6, max_sequences=3, max_batch_tokens=8, prefix_cache=False)
    machine.add([0, 1], 8)
    machine.add([1, 1], 8)
    machine.run()
    assert machine.scheduler.num_preemptions > 0
    assert machine.answers == {"0": expected([0, 1], 8), "1": expected([1, 1], 8)}
    machine.scheduler.check()


def test_nobody_overtakes_a_sequence_that_waits_for_blocks() -> None:
    machine = Machine(num_blocks=6, max_sequences=3, max_batch_tokens=12)
    machine.add([0] * 8, 3)
    machine.step()
    machine.add([1] * 8, 1)
    machine.add([2], 1)
    assert [work.sequence.arrival for work in machine.step()] == [0]
    machine.run()
    assert list(machine.answers) == ["0", "1", "2"]


def test_other_pixels_are_another_prefix() -> None:
    machine = Machine(num_blocks=40, max_sequences=4, max_batch_tokens=8)
    prompt = [0, 1, 1, 1, 2, 2, 1, 0]
    images = [ImageInput.of(np.full((3, 2, 2), i, np.uint8), 1, 3) for i in (0, 1)]
    sequences = [machine.add(prompt, 1, (image,)) for image in (*images, images[0])]
    machine.run()
    assert [sequence.cached_tokens for sequence in sequences] == [0, 0, 6]
    assert sequences[0].digests[0] != sequences[1].digests[0]


def test_prompt_logprobs_need_every_prompt_token() -> None:
    machine = Machine(num_blocks=40, max_batch_tokens=8)
    machine.add([0, 1, 2, 0, 1], 1)
    machine.run()
    again = machine.add([0, 1, 2, 0, 1], 1, params=SamplingParams(prompt_logprobs=0))
    machine.run()
    assert again.cached_tokens == 0


def test_check_sees_a_leaked_slot() -> None:
    machine = Machine()
    sequence = machine.add([0, 1, 2], 4)
    machine.step()
    sequence.slot = 2
    with pytest.raises(AssertionError):
        machine.scheduler.check()


def test_confirmed_guesses_save_steps_and_fallen_ones_cost_no_block() -> None:
    machine = Machine(num_blocks=10, max_batch_tokens=8)
    sequence = machine.add([0, 1], 12)
    machine.step()
    machine.step(guesses=[True, True, True])
    assert (sequence.num_generated, len(sequence.blocks)) == (5, 3)
    machine.step(guesses=[True, False, True])
    assert (sequence.num_generated, len(sequence.blocks)) == (7, 5)
    machine.step(guesses=[False] * 9)
    assert (sequence.num_generated, len(sequence.blocks)) == (8, 5)
    machine.scheduler.check()
    machine.run()
    assert machine.answers == {"0": expected([0, 1], 12)}


def test_guesses_get_only_the_blocks_that_are_left() -> None:
    machine = Machine(num_blocks=4, max_batch_tokens=8)
    sequence = machine.add([0, 1], 6)
    machine.step()
    machine.scheduler.plan()
    assert machine.scheduler.reserve(sequence, 9) == 5
    assert machine.pool.num_free == 0
    machine.scheduler.trim(sequence)
    assert machine.pool.num_free == 2
    machine.scheduler.check()


def test_a_block_of_a_draft_model_is_shared_where_the_token_behind_it_is_the_same() -> None:
    machine = Machine(num_blocks=40, max_batch_tokens=8, num_ahead=1)
    prompt = [0, 1, 2, 0, 1, 2, 2, 1, 0]
    sequences = [machine.add(prompt, 1)]
    machine.run()
    sequences += [machine.add([*prompt[:i], (prompt[i] + 1) % VOCAB, 1], 1) for i in (3, 4, 5)]
    sequences += [machine.add(prompt, 1)]
    machine.run()
    assert [sequence.cached_tokens for sequence in sequences] == [0, 2, 2, 4, 8]
    machine.scheduler.check()


def test_blocks_of_answers_are_found_though_they_are_full_before_the_next_token_is_known() -> None:
    machine = Machine(num_blocks=40, max_batch_tokens=8, num_ahead=1)
    machine.add([0, 1, 2], 6)
    machine.run()
    turn = [0, 1, 2, *machine.answers["0"], 1]
    again = machine.add(turn, 1)
    machine.run()
    # Nine known tokens, the last never computed: four full blocks, the last without a next step.
    assert again.cached_tokens == 6


class Requests(RuleBasedStateMachine):
    """Any mixture of arrivals, steps and aborts gives each request its solo answer."""

    prefix_cache = True
    num_ahead = 0

    def __init__(self) -> None:
        super().__init__()
        self.machine = Machine(
            num_blocks=8,
            max_sequences=3,
            max_batch_tokens=5,
            prefix_cache=self.prefix_cache,
            num_ahead=self.num_ahead,
        )
        self.wanted: dict[str, list[int]] = {}

    # A length of at most 15 fits into the 16 positions of the pool.
    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=9),
        max_tokens=st.integers(1, 6),
        priority=st.sampled_from([0, 0, 1, 7]),
    )
    def add(self, prompt: list[int], max_tokens: int, priority: int) -> None:
        sequence = self.machine.add(prompt, max_tokens, priority=priority)
        self.wanted[sequence.request.request_id] = expected(prompt, max_tokens)

    @rule(max_prefill_tokens=st.sampled_from([None, 1, 3]))
    def step(self, max_prefill_tokens: int | None) -> None:
        self.check_step(self.machine.step(max_prefill_tokens))

    @rule(guesses=st.lists(st.booleans(), min_size=1, max_size=5))
    def step_with_guesses(self, guesses: list[bool]) -> None:
        """Blocks that fallen guesses filled are given back, and nobody ever reads them."""
        self.check_step(self.machine.step(None, guesses))

    def check_step(self, works: list[Work]) -> None:
        assert works or not self.machine.scheduler.has_work()
        assert sum(work.count for work in works) <= 5
        arrivals = [work.sequence.arrival for work in works]
        assert len(set(arrivals)) == len(arrivals)

    @precondition(lambda self: self.machine.scheduler.has_work())
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        scheduler = self.machine.scheduler
        sequence = data.draw(st.sampled_from([*scheduler.running, *scheduler.waiting]))
        assert scheduler.find(sequence.request.request_id) is sequence
        scheduler.remove(sequence)
        assert scheduler.find(sequence.request.request_id) is None
        del self.wanted[sequence.request.request_id]

    @invariant()
    def books_agree(self) -> None:
        self.machine.scheduler.check()

    def teardown(self) -> None:
        self.machine.run()
        assert self.machine.answers == self.wanted
        self.machine.scheduler.check()
        assert self.machine.pool.num_free == self.machine.pool.num_blocks


class RequestsWithoutCache(Requests):
    prefix_cache = False


class RequestsWithDraftModel(Requests):
    """Entries of positions depend on the token behind them, and are shared all the same."""

    num_ahead = 1


TestRequests = Requests.TestCase
TestRequests.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
TestRequestsWithoutCache = RequestsWithoutCache.TestCase
TestRequestsWithoutCache.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
TestRequestsWithDraftModel = RequestsWithDraftModel.TestCase
TestRequestsWithDraftModel.settings = settings(
    max_examples=50, stateful_step_count=30, deadline=None
)
