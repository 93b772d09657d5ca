"""The engine: add, abort, step. One thread uses it; `service` is its asyncio face.

A step asks the scheduler what to compute, computes it, chooses tokens and reports events. On the
CUDA kernels the next step is launched before the tokens of the last one are read, wherever those
are chosen on the device: the scheduler then plans with places for tokens (decision 0039).
"""

import math
import secrets
import time
from collections.abc import Generator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from halfbyte.engine.answers import Answers
from halfbyte.engine.config import EngineConfig as EngineConfig
from halfbyte.engine.drafter import Drafter
from halfbyte.engine.load import load_runner
from halfbyte.engine.measure import measure_costs
from halfbyte.engine.pinned import PendingTokens
from halfbyte.engine.plan.blocks import BlockPool
from halfbyte.engine.plan.pacing import (
    BALANCED_GAP_S,
    Demand,
    FreePacer,
    GapPacer,
    LinePacer,
    SlicePacer,
)
from halfbyte.engine.plan.scheduler import Scheduler
from halfbyte.engine.plan.sequence import Sequence, Work
from halfbyte.engine.plan.speculation import Guesser, Lookup, Pace, Speculator
from halfbyte.engine.request import (
    Event,
    FinishEvent,
    GenerationRequest,
    ImageInput,
    SamplingParams,
)
from halfbyte.engine.runner import Computed, Runner, SlicedPrompt
from halfbyte.engine.sampler import ChosenToken, LogitsHook, Sampler, is_choosable
from halfbyte.engine.slices import CHUNK_TOKENS
from halfbyte.engine.stats import EngineStats as EngineStats
from halfbyte.errors import CapacityError, RequestError

# A step that encodes images and generates nothing.
_ENCODE_S = 0.1


@dataclass(frozen=True, slots=True, eq=False)
class _Flight:
    """A launched step whose tokens are not read yet.

    chosen  the sequences that get a token, in the order of `tokens`
    """

    works: SequenceOf[Work]
    chosen: SequenceOf[Sequence]
    tokens: PendingTokens
    launched: float


class Engine:
    """Runs requests on one model. No state is shared between engines."""

    def __init__(
        self,
        runner: Runner,
        config: EngineConfig,
        *,
        logits_hook: LogitsHook | None = None,
        guesser: Guesser | None = None,
    ) -> None:
        """Take a loaded runner and a resolved configuration; programs use `Engine.load`.

        For tests: `logits_hook` makes a model say certain things, `guesser` replaces the one that
        `config.speculative` names.
        """
        assert config.kv_cache_tokens is not None and config.max_model_len is not None
        text, draft = runner.device.config, runner.device.draft
        self.config = config
        self.max_model_len = config.max_model_len
        self.vocab_size = text.vocab_size
        self.eos_token_ids = text.eos_token_ids
        self._runner = runner
        self._pool = BlockPool(config.kv_cache_tokens // config.block_tokens, config.block_tokens)
        self._sampler = Sampler(text.vocab_size, text.eos_token_ids, config.device, logits_hook)
        self._drafter = None if draft is None else Drafter(draft, runner, self._sampler)
        self._scheduler = Scheduler(
            self._pool,
            max_sequences=config.max_sequences,
            max_batch_tokens=config.max_batch_tokens,
            prefix_cache=config.prefix_cache,
            num_ahead=0 if self._drafter is None else 1,
        )
        gap_ms = config.target_gap_ms
        # The gap in seconds where the configuration names a number.
        self._gap_s = gap_s = None if isinstance(gap_ms, str) else gap_ms / 1e3
        is_free = gap_ms == "none"
        self._pacer: GapPacer | LinePacer | FreePacer = FreePacer() if is_free else LinePacer(gap_s)
        # How long chunks of prompts may take beside running answers, where they can be sliced.
        self._slice_pacer: SlicePacer | None = None
        if not is_free and runner.can_slice:
            self._slice_pacer = SlicePacer(gap_s)
        self._chunk: SlicedPrompt | None = None
        self._speculator = _make_speculator(config, guesser or self._drafter)
        self._answers = Answers(
            self._scheduler, self._sampler, self._speculator, text.eos_token_ids
        )
        # Hooks and guesses need each step's logits before the next.
        is_free = logits_hook is None and self._speculator is None
        self._runs_ahead = is_free and runner.can_run_ahead
        self._flight: _Flight | None = None
        # Works that were planned before the last tokens were known, and were not launched.
        self._planned: list[Work] = []
        self._last_collected = 0.0
        # Whether the step collected last had ended by then.
        self._is_awaited = True
        # Block lists held by `score`.
        self._scoring: list[list[int]] = []
        self._num_added = 0
        self._num_steps = 0
        self._step_s = 0.0

    @classmethod
    def load(
        cls,
        directory: str | Path,
        config: EngineConfig | None = None,
        *,
        logits_hook: LogitsHook | None = None,
        guesser: Guesser | None = None,
    ) -> "Engine":
        """Load a checkpoint. Raises CheckpointError, UsageError or CapacityError.

        Call `close` at the end of one that runs in several processes.
        """
        runner, resolved = load_runner(directory, config or EngineConfig())
        engine = cls(runner, resolved, logits_hook=logits_hook, guesser=guesser)
        engine.measure_steps()
        return engine

    def measure_steps(self) -> None:
        """Time steps of every size, where the device has sizes and answers' gaps are to be kept.

        Call it before the first request: what the cache holds is overwritten.
        """
        if self._runner.step_sizes and self.config.target_gap_ms != "none":
            assert not self._answers.request_ids
            costs = measure_costs(self._runner, self.config)
            gap_s = self._gap_s or BALANCED_GAP_S
            self._pacer = GapPacer(gap_s, costs, is_balanced=self._gap_s is None)

    def validate(self, request: GenerationRequest) -> None:
        """Raise RequestError if the request can never run here. Safe from any thread."""
        request.params.validate(self.vocab_size)
        prompt = request.prompt_token_ids
        if not prompt:
            raise RequestError("the prompt has no tokens", param="prompt", code="empty_prompt")
        if len(prompt) >= self.max_model_len:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens; at most {self.max_model_len - 1} fit, as "
                f"the context holds {self.max_model_len} and the answer needs one",
                param="prompt",
                code="context_length_exceeded",
            )
        if not 0 <= min(prompt) <= max(prompt) < self.vocab_size:
            raise RequestError(
                f"the prompt has token id {min(prompt) if min(prompt) < 0 else max(prompt)}; ids "
                f"go from 0 to {self.vocab_size - 1}",
                param="prompt",
                code="invalid_token_id",
            )
        if request.images:
            if self._runner.images is None:
                raise RequestError(
                    "this model takes no images", param="messages", code="images_not_supported"
                )
            self._runner.images.validate(request)

    def add(self, request: GenerationRequest, *, is_validated: bool = False) -> None:
        """Queue a request. Raises RequestError if it can never run or its id is in use.

        is_validated  by `validate`, which a long prompt need not go through twice
        """
        if not is_validated:
            self.validate(request)
        if request.request_id in self._answers.request_ids:
            raise RequestError(f"request id {request.request_id!r} is in use", param="request_id")
        params = request.params
        room = self.max_model_len - len(request.prompt_token_ids)
        sequence = Sequence(
            request,
            arrival=self._num_added,
            seed=params.seed if params.seed is not None else secrets.randbits(64),
            max_tokens=min(params.max_tokens or room, room),
        )
        self._num_added += 1
        self._answers.request_ids.add(request.request_id)
        self._scheduler.add(sequence)

    def abort(self, request_id: str) -> FinishEvent | None:
        """End a request in whatever state it is and free its blocks; None if it is not known."""
        if request_id not in self._answers.request_ids:
            return None
        sequence = self._scheduler.find(request_id)
        assert sequence is not None, f"request {request_id} is known but not scheduled"
        finish = self._answers.finish(sequence, "abort")
        self._let_go()
        return finish

    def request_ids(self) -> tuple[str, ...]:
        """Ids of the requests that run or wait."""
        return tuple(self._answers.request_ids)

    def has_work(self) -> bool:
        return self._scheduler.has_work()

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Compute one step; events of the tokens that it produced. Empty without work."""
        flight, self._flight = self._flight, None
        if flight is None:
            works = self._next_works()
            if not works and not self._scheduler.carried:
                return []
            flight = self._launch(works)
            if flight is None:
                return self._run(works)
        if self._scheduler.can_run_ahead():
            ahead = self._scheduler.plan(self._prompt_tokens)
            self._flight = self._launch(ahead)
            if self._flight is None:
                self._planned = ahead
        return self._collect(flight)

    def _next_works(self) -> list[Work]:
        """Works that were planned but not launched, as far as still wanted; else a new plan."""
        planned, self._planned = self._planned, []
        works = [work for work in planned if work.sequence.slot is not None]
        if not works and self.has_work():
            works = self._scheduler.plan(self._prompt_tokens)
            assert works or self._scheduler.carried, "requests wait but nothing can run"
        return works

    def _prompt_tokens(self, demand: Demand) -> int | None:
        """Prompt tokens of a step that also generates."""
        return self._pacer.prompt_tokens(demand) if self._slice_pacer is None else CHUNK_TOKENS

    def _run(self, works: SequenceOf[Work]) -> list[Event]:
        """Compute a step and choose its tokens on the host."""
        started = time.perf_counter()
        works = self._begin_chunk(works)
        num_decodes = sum(map(_is_single, works))
        is_sliced = self._chunk is not None
        done = self._advance_chunk(num_decodes, started)
        if not works and done is None:
            self._observe((), 0, time.perf_counter() - started)
            return []
        sliced_s = 0.0 if not is_sliced else time.perf_counter() - started
        if self._speculator is not None:
            works = self._speculator.propose(works, self._scheduler)
        all_works = [*works, *(() if done is None else done.works)]
        chosen = [work.sequence for work in all_works if work.is_last]
        self._sampler.prepare(chosen)
        found = [self._runner.run(works)] if works else []
        if done is not None:
            found.append(done)
        events: list[Event] = []
        for computed in found:
            self._answers.conclude(computed, events)
        self._let_go()
        if self._drafter is not None:
            self._drafter.follow(found)
        seconds = time.perf_counter() - started
        if self._speculator is not None:
            self._speculator.observe(seconds - sliced_s, all_works)
        if self._slice_pacer is not None and works and num_decodes == len(works):
            # Short chunks, which end in the step that begins them, count as well: without them
            # the pacer would learn nothing after a slow step ahead of a prompt.
            self._slice_pacer.observe(num_decodes, seconds - sliced_s, sliced_s)
        self._observe(all_works, num_decodes, seconds, is_awaited=bool(chosen))
        return events

    def _begin_chunk(self, works: SequenceOf[Work]) -> SequenceOf[Work]:
        """Begin to compute the prompts of a plan in slices; returns the other works.

        For a plan that also generates, or that waits for images. The chunk that was begun before is
        dropped if one of its sequences cannot go on.
        """
        self._let_go()
        singles = [work for work in works if _is_single(work)]
        if self._slice_pacer is None or len(singles) == len(works):
            return works
        assert self._chunk is None
        if not singles and not self._runner.lacks_images(works):
            return works
        prompts = [work for work in works if not _is_single(work)]
        self._chunk = self._runner.begin(prompts)
        self._scheduler.carry(prompts)
        return singles

    def _advance_chunk(self, num_decodes: int, started: float) -> Computed | None:
        """Compute a part of the chunk, for as long as running answers allow.

        Without running answers the chunk is computed to its end, but its images in short steps:
        requests come and leave between these.

        started  when the step began, so that beginning a chunk counts, too
        """
        if self._chunk is None:
            return None
        assert self._slice_pacer is not None
        seconds = self._slice_pacer.allowance_s(num_decodes) if num_decodes else math.inf
        if not num_decodes and not self._chunk.slices.encode(started + _ENCODE_S):
            return None
        done = self._chunk.advance(started + seconds)
        if done is not None:
            self._chunk = None
        return done

    def _launch(self, works: SequenceOf[Work]) -> _Flight | None:
        """Start a step that chooses its tokens on the device; None if it cannot do so."""
        chosen = [work.sequence for work in works if work.is_last]
        if (
            not self._runs_ahead
            or not works
            or not all(map(is_choosable, chosen))
            or any(work.sequence.wants_prompt_logprobs for work in works)
        ):
            return None
        launched = time.perf_counter()
        tokens = self._runner.launch(works)
        for work in works:
            self._scheduler.begin(work)
        for row, sequence in enumerate(chosen):
            sequence.reserve(row)
        return _Flight(works, chosen, tokens, launched)

    def _collect(self, flight: _Flight) -> list[Event]:
        """Wait for the tokens of a launched step and move their sequences on."""
        token_ids = self._runner.wait(flight.tokens)
        events: list[Event] = []
        for work in flight.works:
            if not work.sequence.is_finished:
                self._scheduler.publish(work)
        for sequence, token_id in zip(flight.chosen, token_ids, strict=True):
            if not sequence.is_finished:
                self._answers.accept(sequence, ChosenToken(token_id), events)
        now = time.perf_counter()
        chosen = {sequence.arrival for sequence in flight.chosen}
        num_decodes = sum(w.count == 1 and w.sequence.arrival in chosen for w in flight.works)
        seconds = now - max(flight.launched, self._last_collected)
        self._last_collected = now
        self._observe(flight.works, num_decodes, seconds, is_awaited=bool(flight.chosen))
        return events

    def _observe(
        self, works: SequenceOf[Work], num_decodes: int, seconds: float, *, is_awaited: bool = True
    ) -> None:
        """Count a step; the pacer learns from it if its time is its own.

        is_awaited  somebody has read a result: where not, the step may end at any time, and what
                    seems to be the next one's time is that of both
        """
        is_own, self._is_awaited = is_awaited and self._is_awaited, is_awaited
        if self._slice_pacer is None and is_own:
            num_tokens = sum(work.count for work in works)
            # What the answers' own contexts cost is learnt apart.
            chunks = (work for work in works if work.count > 1)
            row_tokens = sum(work.count * (work.start + work.count / 2) for work in chunks)
            self._pacer.observe(seconds, num_decodes, num_tokens - num_decodes, row_tokens)
        self._num_steps += 1
        self._step_s += seconds

    def facts(self) -> dict[str, object]:
        """What runs the model and what memory it takes: facts by name, for people."""
        step_ms = {str(n): round(s * 1e3, 2) for n, s in self._pacer.table().items()}
        return {**self._runner.facts(), **({"step_ms": step_ms} if step_ms else {})}

    @torch.inference_mode()
    def score(
        self,
        token_ids: SequenceOf[int],
        chunk_tokens: int = 512,
        *,
        images: tuple[ImageInput, ...] = (),
    ) -> Generator[Tensor, None, None]:
        """Teacher forcing through the paged cache: logits f32 (t, V), chunk by chunk.

        images  of which the tokens are among `token_ids`

        Row i of all chunks together is the distribution of token i + 1. Raises RequestError for a
        text over the context and for images that do not fit it, CapacityError if running requests
        leave too few blocks. The blocks are freed when the iterator ends or is closed.
        """
        if not 0 < len(token_ids) <= self.max_model_len:
            raise RequestError(
                f"a text of {len(token_ids)} tokens cannot be scored: 1 to {self.max_model_len} "
                "tokens fit",
                code="context_length_exceeded",
            )
        params = SamplingParams(prompt_logprobs=0)
        request = GenerationRequest("score", tuple(token_ids), params, images=images)
        if images:
            if self._runner.images is None:
                raise RequestError("this model takes no images", code="images_not_supported")
            self._runner.images.validate(request)
        num_blocks = self._scheduler.num_blocks_for(len(token_ids))
        if num_blocks > self._pool.num_free:
            raise CapacityError(
                f"scoring {len(token_ids)} tokens needs {num_blocks} KV blocks, "
                f"{self._pool.num_free} are free"
            )
        sequence = Sequence(request, arrival=-1, seed=0, max_tokens=1)
        sequence.blocks = self._pool.allocate(num_blocks)
        self._scoring.append(sequence.blocks)
        try:
            for start in range(0, len(token_ids), chunk_tokens):
                count = min(chunk_tokens, len(token_ids) - start)
                yield self._runner.run_alone(Work(sequence, start, count))
        finally:
            self._pool.release(sequence.blocks)
            self._scoring.remove(sequence.blocks)

    def stats(self) -> EngineStats:
        """Figures now. Safe from any thread; single figures may be a step apart."""
        scheduler, pool, runner = self._scheduler, self._pool, self._runner
        speculator, answers = self._speculator, self._answers
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            total_blocks=pool.num_blocks,
            free_blocks=pool.num_free,
            cached_blocks=pool.num_cached,
            block_tokens=pool.block_tokens,
            weight_bytes=runner.weight_bytes,
            cache_bytes=runner.cache_bytes,
            requests=self._num_added,
            steps=self._num_steps,
            step_s=self._step_s,
            preemptions=scheduler.num_preemptions,
            prompt_tokens=answers.prompt_tokens,
            cached_tokens=answers.cached_tokens,
            generated_tokens=answers.generated_tokens,
            proposed_tokens=0 if speculator is None else speculator.num_proposed,
            accepted_tokens=0 if speculator is None else speculator.num_accepted,
            saturation=runner.saturation(),
        )

    def clear_prefix_cache(self) -> None:
        """Forget all cached prefixes; blocks in use are not touched."""
        self._pool.clear_cache()

    @property
    def failure(self) -> str | None:
        """Why no step can run any more: what another rank died of. Safe from any thread."""
        return self._runner.failure

    def close(self) -> None:
        """End the engine's threads and the processes of other ranks; no step can run then."""
        self._sampler.close()
        self._runner.close()

    def check(self) -> None:
        """Recompute the books from scratch and assert that they agree."""
        self._scheduler.check(self._scoring)
        self._answers.check()

    def _let_go(self) -> None:
        """Forget what was computed in part for sequences that have left."""
        if self._chunk is not None and self._chunk.works is not self._scheduler.carried:
            self._chunk = None
        images = self._runner.images
        if images is not None and images.has_begun:
            left = (*self._scheduler.running, *self._scheduler.waiting)
            images.release(sequence.request for sequence in left)


def _is_single(work: Work) -> bool:
    """Whether the work computes the last known token alone, as for a sequence that generates."""
    return work.count == 1 and work.is_last


def _make_speculator(config: EngineConfig, guesser: Guesser | None) -> Speculator | None:
    if config.speculative is None:
        return None
    assert config.num_speculative_tokens is not None
    pace = Pace(config.num_speculative_tokens, is_adaptive=config.adaptive_speculation)
    return Speculator(guesser or Lookup(), pace)
