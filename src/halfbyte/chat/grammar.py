"""Grammars that hold an answer to a schema, a regex, a choice, a grammar, or to tool calls.

Here they are written and checked; `grammar_follow` makes masks of what has passed, where the engine
runs. What a stranger's grammar may cost is bounded before, while and after it is compiled (decision
0044). Grammars address control tokens by id, so text can never spell one. Thoughts stand outside
the grammar: `ThoughtMask` lets them pass and starts the grammar after them. What llguidance
refuses: docs/reference/chat.md#grammars.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from typing import Any

from halfbyte.chat.grammar_follow import GrammarMask, GrammarMasks, WrappedVocabulary
from halfbyte.chat.grammar_limits import GrammarLimits
from halfbyte.chat.grammar_masks import CheckedGrammar

# Programs that compile grammars write them, too.
from halfbyte.chat.grammar_texts import choice_grammar as choice_grammar
from halfbyte.chat.grammar_texts import json_schema_grammar as json_schema_grammar
from halfbyte.chat.grammar_texts import regex_grammar as regex_grammar
from halfbyte.chat.grammar_texts import tools_grammar as tools_grammar
from halfbyte.chat.grammar_trial import GrammarTrials, Words
from halfbyte.chat.schema import (
    HeldSchema,
    object_schema,
    short_list,
    tidied,
    wide_bounds,
)
from halfbyte.chat.vocabulary import Vocabulary
from halfbyte.errors import RequestError


class GrammarCompiler:
    """Writes and checks grammars. Safe to use from several threads."""

    def __init__(self, vocabulary: Vocabulary, limits: GrammarLimits | None = None) -> None:
        self._vocabulary = vocabulary
        self._limits = limits or GrammarLimits()
        wrapped = WrappedVocabulary(vocabulary)
        words = Words(
            wrapped.tokens,
            wrapped.special_token_ids,
            wrapped.bos_token_id,
            list(vocabulary.eos_token_ids),
        )
        self._trials = GrammarTrials(words, self._limits)
        self._passed: OrderedDict[tuple[str, bool], CheckedGrammar] = OrderedDict()
        self._lock = threading.Lock()
        # For those who wait for a trial, which must not keep other work of the server waiting.
        self.threads = ThreadPoolExecutor(64, thread_name_prefix="grammars")

    def start(self) -> None:
        """Make ready what the first grammar would wait for."""
        self._trials.start()

    def wait(self) -> None:
        """Wait until that is done; RequestError (503) if it takes too long."""
        self._trials.wait()

    def compile(
        self, lark: str, param: str, *, is_free: bool = False, timeout_s: float = 10.0
    ) -> CheckedGrammar:
        """Check a Lark grammar, or take it from the cache.

        is_free    a client wrote the rules themselves, not a schema or a regex
        timeout_s  for the trial, in a process of its own

        Raises RequestError(param) with llguidance's message for what it cannot express.
        """
        self.check_size(len(lark.encode()), param)
        key = (lark, is_free)
        known = self._known(key)
        if known is not None:
            return replace(known, param=param)
        tried = self._trials.compile(lark, is_free=is_free, timeout_s=timeout_s)
        if tried.fault is not None:
            code = "schema_too_complex" if tried.has_died else "unsupported_schema"
            raise RequestError(f"{param}: {tried.fault}", param=param, code=code)
        checked = CheckedGrammar(lark, is_free, tried.num_bytes, tried.warnings, param)
        with self._lock:
            self._passed[key] = checked
            total = sum(len(text) for text, _ in self._passed)
            while total > self._limits.passed_chars:
                (text, _), _ = self._passed.popitem(last=False)
                total -= len(text)
        return checked

    @cached_property
    def masks(self) -> GrammarMasks:
        """Makes masks in this process, for who runs an engine in it; a server does not."""
        return GrammarMasks(self._vocabulary, self._limits)

    def mask(self, grammar: CheckedGrammar, banned_token_ids: Sequence[int] = ()) -> GrammarMask:
        """A fresh mask for one sequence, made here; see `grammar_follow.GrammarMasks.mask`."""
        return self.masks.mask(grammar, banned_token_ids)

    def _known(self, key: tuple[str, bool]) -> CheckedGrammar | None:
        with self._lock:
            known = self._passed.get(key)
            if known is not None:
                self._passed.move_to_end(key)
            return known

    def compile_schemas(
        self,
        schemas: Sequence[HeldSchema],
        write: Callable[[Sequence[Mapping[str, Any]]], str],
        param: str,
        *,
        timeout_s: float = 10.0,
    ) -> tuple[CheckedGrammar, tuple[str, ...]]:
        """Compile a grammar that holds some schemas; also what of them it does not hold.

        write  makes the grammar from the schemas, which may have changed

        Of a schema that is not strict, clauses that cannot be held are left out and named. Raises
        RequestError with the path of the clause for a strict one.
        """
        for held in schemas:
            self.check_schema(held.schema, held.path)
        notes: list[str] = [note for held in schemas for note in wide_bounds(held)]
        usable: list[HeldSchema] = []
        for held in schemas:
            schema = held.schema
            if not held.strict:
                found = tidied(held)
                schema = found.schema
                notes += found.notes
            if held.is_object:
                schema = object_schema(schema, held.path)
            usable.append(replace(held, schema=schema))
        lark = write([held.schema for held in usable])
        try:
            compiled = self.compile(lark, param, timeout_s=timeout_s)
        except RequestError as error:
            if error.code != "unsupported_schema":
                raise
            results = self._trials.mend(usable, timeout_s=timeout_s)
            if results is None:
                raise
            for result in results:
                if result.fault is not None:
                    raise RequestError(
                        result.fault, param=param, code="unsupported_schema"
                    ) from error
                notes += result.notes
            mended_lark = write([result.schema for result in results])
            if mended_lark == lark:
                raise
            compiled = self.compile(mended_lark, param, timeout_s=timeout_s)
        return compiled, short_list((*notes, *compiled.warnings))

    def check_size(self, num_bytes: int, param: str) -> None:
        """Refuse sources over the limit; a character counts as one byte at least."""
        if num_bytes > self._limits.max_source_bytes:
            raise RequestError(
                f"{param}: larger than {self._limits.max_source_bytes:,} bytes",
                param=param,
                code="schema_too_large",
            )

    def check_schema(self, schema: Any, param: str) -> None:
        """Refuse schemas that are too deep or too large, before anything recursive reads them.

        Level by level, and given up as soon as the limit is passed: a value takes two bytes at
        least, one of its own and one that parts it from the next.
        """
        level, num_bytes = [schema], 0
        for _ in range(self._limits.max_depth + 1):
            below: list[Any] = []
            for value in level:
                if isinstance(value, Mapping | list):
                    num_bytes += 2 * len(value)
                    self.check_size(num_bytes, param)
                    below += value.values() if isinstance(value, Mapping) else value
                if isinstance(value, Mapping):
                    num_bytes += sum(map(len, value))
                elif isinstance(value, str):
                    num_bytes += len(value)
                self.check_size(num_bytes, param)
            if not below:
                return
            level = below
        raise RequestError(
            f"{param}: nested deeper than {self._limits.max_depth}",
            param=param,
            code="schema_too_deep",
        )
