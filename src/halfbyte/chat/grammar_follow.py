"""Masks that hold answers to checked grammars: compiled, followed token by token, bounded.

One of these lives where the engine runs; what it is given has passed `grammar`, which tries each
grammar in a process that may die (decision 0044). llguidance keeps the grammars (decision 0014):
one tokenizer a process, one matcher a sequence.
"""

import contextlib
import ctypes
import os
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import llguidance

from halfbyte.chat.grammar_limits import (
    GrammarLimits,
    build,
    fault,
    max_forced_length,
    sentence,
    work_done,
)
from halfbyte.chat.grammar_masks import (
    NOTHING,
    Bitmask,
    CheckedGrammar,
    CompiledGrammar,
    token_bits,
)
from halfbyte.chat.vocabulary import Vocabulary
from halfbyte.errors import RequestError
from halfbyte.machine import give_way

# Expressions of llguidance's lexer take at most so much, and places in its parser.
_EXPRESSION_BYTES = 400
_PLACE_BYTES = 40


class GrammarMasks:
    """Makes masks from checked grammars. Safe to use from several threads."""

    def __init__(self, vocabulary: Vocabulary, limits: GrammarLimits | None = None) -> None:
        self._vocabulary = vocabulary
        self._limits = limits or GrammarLimits()
        self._tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(WrappedVocabulary(vocabulary)),
            eos_token=list(vocabulary.eos_token_ids),
        )
        self._cache: OrderedDict[CheckedGrammar, CompiledGrammar] = OrderedDict()
        self._live: weakref.WeakSet[CompiledGrammar] = weakref.WeakSet()
        self._lock = threading.Lock()
        # One at a time: what compiling takes for a moment is not taken twice.
        self._compiling = threading.Lock()
        self._builder: ThreadPoolExecutor | None = None
        self._memory = _Memory()

    def mask(self, grammar: CheckedGrammar, banned_token_ids: Sequence[int] = ()) -> "GrammarMask":
        """A fresh mask for one sequence; the banned ids are never allowed, whatever it says.

        Raises RequestError (429) if there is no room for the grammar beside those in use.
        """
        return GrammarMask(self._compiled(grammar), self._vocabulary, banned_token_ids, self)

    def is_ready(self, grammar: CheckedGrammar) -> bool:
        """Whether a mask of this grammar is made without compiling."""
        return self._known(grammar) is not None

    def _compiled(self, grammar: CheckedGrammar) -> CompiledGrammar:
        known = self._known(grammar)
        if known is not None:
            return known
        with self._compiling:
            known = self._known(grammar)
            if known is not None:
                return known
            self._make_room(grammar)
            compiled = self._compile(grammar)
        self._keep(grammar, compiled)
        return compiled

    def used_bytes(self) -> int:
        """What all compiled grammars take that are in use or kept."""
        with self._lock:
            return sum(grammar.num_bytes for grammar in self._live)

    def memory_bytes(self) -> int:
        """The process's memory; what a grammar grows by is seen there."""
        return self._memory.resident_bytes()

    def has_grown(self, grammar: CompiledGrammar, matcher: Any, num_bytes: int) -> None:
        """Count what memory has grown by while a grammar was followed; drop it at the limit."""
        grammar.grown_bytes += num_bytes
        limits = self._limits
        grown = grammar.grown_bytes
        crowded = grown > limits.max_bytes // 8 and self.used_bytes() > limits.total_bytes
        if grown <= limits.max_bytes and not crowded:
            return
        # Others take memory at the same time: whether it was the grammar, llguidance knows.
        done = work_done(matcher, sorted(self._vocabulary.control_names))
        if done is not None and done[0] * _EXPRESSION_BYTES + done[1] * _PLACE_BYTES < grown:
            grammar.grown_bytes = 0
            return
        self.give_up(grammar, f"following it took more than {grown // 10**6} MB")

    def give_up(self, grammar: CompiledGrammar, problem: str) -> None:
        """Let nobody use a grammar again, and keep nothing of it."""
        grammar.problem = grammar.problem or problem
        with self._lock:
            for key, known in list(self._cache.items()):
                if known is grammar:
                    del self._cache[key]

    def _known(self, key: CheckedGrammar) -> CompiledGrammar | None:
        with self._lock:
            known = self._cache.get(key)
            if known is None:
                return None
            # One that has grown is made anew, which is cheap.
            if known.problem is not None or known.grown_bytes > self._limits.max_bytes // 4:
                del self._cache[key]
                return None
            self._cache.move_to_end(key)
            return known

    def _keep(self, key: CheckedGrammar, grammar: CompiledGrammar) -> None:
        with self._lock:
            self._live.add(grammar)
            self._cache[key] = grammar
            total = sum(known.num_bytes for known in self._cache.values())
            while total > self._limits.cache_bytes and self._cache:
                total -= self._cache.popitem(last=False)[1].num_bytes
        end = weakref.finalize(grammar, self._memory.give_back_soon)
        end.atexit = False  # type: ignore[misc]

    def _make_room(self, grammar: CheckedGrammar) -> None:
        """Refuse a grammar for which there is no room beside those in use."""
        limits = self._limits
        if self.used_bytes() + grammar.num_bytes <= limits.total_bytes:
            return
        with self._lock:
            self._cache.clear()
        used = self.used_bytes()
        if used + grammar.num_bytes > limits.total_bytes:
            raise RequestError(
                f"{grammar.param}: the grammars of running answers take {used // 10**6} MB of "
                f"{limits.total_bytes // 10**6} MB; try again when some have ended",
                param=grammar.param,
                code="grammars_full",
                status=429,
            )

    def _compile(self, grammar: CheckedGrammar) -> CompiledGrammar:
        """Compile what the trial has passed, on a stack four times the trial's."""
        if self._builder is None:
            self._builder = ThreadPoolExecutor(
                1, thread_name_prefix="grammar", initializer=give_way
            )
            usual = threading.stack_size(4 * self._limits.trial_stack_bytes)
            try:
                # Starts its one thread.
                self._builder.submit(int)
            finally:
                threading.stack_size(usual)
        matcher = self._builder.submit(
            build, self._tokenizer, grammar.lark, self._limits, is_free=grammar.is_free
        ).result()
        message = fault(matcher)
        if message is not None:
            raise RequestError(
                f"{grammar.param}: {message}", param=grammar.param, code="unsupported_schema"
            )
        return CompiledGrammar(matcher, grammar.num_bytes)


class _Memory:
    """The process's memory: how much, and what is free of it back to the system."""

    def __init__(self) -> None:
        self._page_bytes = os.sysconf("SC_PAGE_SIZE")
        self._descriptor = -1
        with contextlib.suppress(OSError):
            self._descriptor = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
            weakref.finalize(self, os.close, self._descriptor)
        self._is_due = threading.Lock()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        self._trim: Callable[[int], int] = trim if trim is not None else lambda _: 0

    def resident_bytes(self) -> int:
        """Pages in memory; 0 where the system does not say."""
        if self._descriptor < 0:
            return 0
        return int(os.pread(self._descriptor, 128, 0).split()[1]) * self._page_bytes

    def give_back_soon(self) -> None:
        """A grammar has gone: give its pages back, once for all that go together."""
        if self._is_due.acquire(blocking=False):
            threading.Thread(target=self._give_back, name="trim", daemon=True).start()

    def _give_back(self) -> None:
        time.sleep(0.2)
        self._is_due.release()
        self._trim(0)


class GrammarMask:
    """A mask that holds one sequence to a grammar, and how far it has come in it."""

    def __init__(
        self,
        grammar: CompiledGrammar,
        vocabulary: Vocabulary,
        banned_token_ids: Sequence[int],
        owner: GrammarMasks,
    ) -> None:
        self._grammar = grammar
        self._owner = owner
        # None after a failure, so that nothing of it is kept.
        self._matcher: Any = grammar.matcher.deep_copy()
        self._vocab_size = vocabulary.size
        self._num_words = -(-vocabulary.size // 32)
        self._eos_token_ids = vocabulary.eos_token_ids
        self._allowed = ~token_bits(banned_token_ids, self._num_words)
        self._is_stuck = False
        self._problem: str | None = None

    def allows(self, token_id: int) -> bool:
        """Whether the grammar permits that this token comes next.

        True also for one that `fill` leaves out, as it sets but one token where only one text may
        follow.
        """
        if self._is_stuck or not self._is_usable() or token_id >= self._vocab_size:
            return False
        if not self._allowed[token_id // 32] >> token_id % 32 & 1:
            return False
        # What it grows by here has been allowed by the last mask, and is counted with the next.
        return bool(self._matcher.validate_tokens([token_id]) == 1)

    def fill(self, bitmask: Bitmask) -> None:
        """Write which tokens may come next; words beyond the tokenizer's vocabulary are cleared."""
        words = bitmask[: self._num_words]
        bitmask[self._num_words :] = 0
        if self._is_usable():
            before = self._owner.memory_bytes()
            self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
            self._count_growth(before)
            words &= self._allowed
        if not self._is_usable():
            words[:] = 0
        if not words.any():
            # The grammar has nothing left that may be said: end, instead of sampling from nothing.
            self._is_stuck = True
            words |= token_bits(self._eos_token_ids, self._num_words)

    def accept(self, token_id: int) -> None:
        """Accept a token; after one against the grammar only an end of answer may follow."""
        if not self._is_stuck and self._is_usable():
            before = self._owner.memory_bytes()
            self._matcher.consume_token(token_id)
            self._count_growth(before)

    def begin(self, token_ids: Sequence[int]) -> int:
        """Accept the beginning of an answer; returns how many of its tokens fit the grammar."""
        # In pieces: llguidance keeps everybody else waiting meanwhile.
        for start in range(0, len(token_ids), 64):
            piece = list(token_ids[start : start + 64])
            if not self._is_usable():
                return start
            before = self._owner.memory_bytes()
            num_fitting = self._matcher.validate_tokens(piece)
            self._matcher.consume_tokens(piece[:num_fitting])
            self._count_growth(before)
            if num_fitting < len(piece):
                return start + int(num_fitting)
        return len(token_ids)

    def is_finished(self) -> bool:
        """Whether nothing but an end of answer may follow."""
        return self._is_stuck or not self._is_usable() or bool(self._matcher.is_stopped())

    @property
    def problem(self) -> str | None:
        """What llguidance says if it gave up, as over its limits in an ambiguous grammar."""
        if not self._is_usable():
            return self._problem
        return "it asks for a token that no answer may hold" if self._is_stuck else None

    def _count_growth(self, before_bytes: int) -> None:
        grown = self._owner.memory_bytes() - before_bytes
        if grown:
            self._owner.has_grown(self._grammar, self._matcher, grown)

    def _is_usable(self) -> bool:
        """Whether the grammar can be followed. What failed is dropped: it may be large."""
        matcher = self._matcher
        if matcher is None:
            return False
        if matcher.is_error():
            self._problem = sentence(matcher.get_error())
            self._owner.give_up(self._grammar, self._problem)
        elif self._grammar.problem is not None:
            self._problem = self._grammar.problem
        else:
            return True
        self._matcher = None
        self._grammar = NOTHING
        return False


class WrappedVocabulary:
    """A vocabulary as llguidance wants it: control tokens by unique names in angle brackets."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.eos_token_id = vocabulary.eos_token_ids[0]
        self.bos_token_id = vocabulary.bos_token_id
        self.tokens = [
            f"<control_{token_id}>".encode() if vocabulary.is_control(token_id) else token
            for token_id, token in enumerate(vocabulary.token_bytes)
        ]
        self.special_token_ids = sorted(vocabulary.control_names)
        self._encode_text = vocabulary.encode_text
        self._max_length = max_forced_length(max(map(len, self.tokens)))

    def __call__(self, text: bytes | str) -> list[int]:
        """Token ids of how a text begins, as the model would be given it.

        Before each token of an answer llguidance asks for the whole text that a grammar forces from
        there on, and uses the first token of it: all of a long one would cost its square.
        """
        text = text[: self._max_length]
        if isinstance(text, bytes):
            text = text.decode("utf-8", errors="replace")
        return self._encode_text(text)
