"""Token masks that hold an answer to a schema, a regex, a choice, a grammar, or to tool calls.

llguidance keeps the grammars (decision 0014): one tokenizer a process, one matcher a sequence.
Grammars address control tokens by id, so text can never spell one. Thoughts stand outside the
grammar: `ThoughtMask` lets them pass and starts the grammar after them.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import llguidance
import numpy as np
from numpy.typing import NDArray

from halfbyte.chat.prompt import ControlTokens
from halfbyte.chat.vocabulary import Vocabulary
from halfbyte.errors import RequestError

Bitmask = NDArray[np.uint32]

# Between two tokens of JSON; without a bound a weak model writes blanks until max_tokens.
_WHITE_SPACE = r"[ \t\r\n]{1,64}"


@dataclass(frozen=True, slots=True)
class GrammarLimits:
    """What one schema or grammar may cost; the fuel and size bounds are llguidance's.

    lexer_fuel     about 50,000 a millisecond while compiling
    grammar_size   symbols
    row_items      places where an answer may stand in the grammar at once, before the mask gives
                   up; an object of n optional properties has 4 n, each looked at once
    free_row_items the same for grammars that a client wrote: ambiguous rules look at pairs, so
                   2,000 would hold up everybody's step for a tenth of a second
    """

    max_source_bytes: int = 262_144
    max_depth: int = 64
    lexer_fuel: int = 4_000_000
    grammar_size: int = 500_000
    row_items: int = 20_000
    free_row_items: int = 400
    cache_entries: int = 256


@dataclass(frozen=True, slots=True)
class CompiledGrammar:
    """A checked grammar; `warnings` names what a lenient schema does not enforce."""

    source: str
    matcher: Any
    warnings: tuple[str, ...]


class Mask(Protocol):
    """The engine's TokenMask (engine.request), which this room may not import."""

    def allows(self, token_id: int) -> bool:
        """Whether this token may come next; False also where only `fill` can tell."""

    def fill(self, bitmask: Bitmask) -> None:
        """Write which tokens may come next: bit 1 is allowed."""

    def accept(self, token_id: int) -> None:
        """The next token has been chosen."""

    def is_finished(self) -> bool:
        """Nothing but an end of answer may follow."""

    @property
    def problem(self) -> str | None:
        """Why the grammar could not be followed to its end; None if it could."""


class GrammarCompiler:
    """Checks grammars and makes masks from them. Safe to use from several threads."""

    def __init__(self, vocabulary: Vocabulary, limits: GrammarLimits | None = None) -> None:
        self._vocabulary = vocabulary
        self._limits = limits or GrammarLimits()
        self._tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_WrappedVocabulary(vocabulary)),
            eos_token=list(vocabulary.eos_token_ids),
        )
        self._cache: OrderedDict[tuple[str, bool], CompiledGrammar] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, lark: str, param: str, *, is_free: bool = False) -> CompiledGrammar:
        """Check a Lark grammar, or take it from the cache.

        is_free   a client wrote the rules themselves, not a schema or a regex

        Raises RequestError(param) with llguidance's message for what it cannot express.
        """
        self.check_size(len(lark.encode()), param)
        key = (lark, is_free)
        with self._lock:
            known = self._cache.get(key)
            if known is not None:
                self._cache.move_to_end(key)
                return known
        compiled = self._compile(lark, param, is_free)
        with self._lock:
            self._cache[key] = compiled
            while len(self._cache) > self._limits.cache_entries:
                self._cache.popitem(last=False)
        return compiled

    def mask(self, grammar: CompiledGrammar, banned_token_ids: Sequence[int] = ()) -> Mask:
        """A fresh mask for one sequence; the banned ids are never allowed, whatever it says."""
        return GrammarMask(grammar, self._vocabulary, banned_token_ids)

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

    def _parser_limits(self, is_free: bool) -> Any:
        limits = self._limits
        return llguidance.LLParserLimits(
            initial_lexer_fuel=limits.lexer_fuel,
            max_grammar_size=limits.grammar_size,
            max_items_in_row=limits.free_row_items if is_free else limits.row_items,
            verbose_errors=False,
        )

    def _compile(self, lark: str, param: str, is_free: bool) -> CompiledGrammar:
        grammar = llguidance.LLMatcher.grammar_from_lark(lark)
        limits = self._parser_limits(is_free)
        is_error, messages = llguidance.LLMatcher.validate_grammar_with_warnings(
            grammar, self._tokenizer, limits=limits
        )
        if not is_error:
            matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
            is_error, messages = (
                (True, [matcher.get_error()]) if matcher.is_error() else (False, messages)
            )
        if is_error:
            raise RequestError(
                f"{param}: {_first_line(messages[0])}", param=param, code="unsupported_schema"
            )
        return CompiledGrammar(lark, matcher, tuple(_first_line(text) for text in messages))


class GrammarMask:
    """One sequence's position in a grammar."""

    def __init__(
        self, grammar: CompiledGrammar, vocabulary: Vocabulary, banned_token_ids: Sequence[int]
    ) -> None:
        self._matcher = grammar.matcher.deep_copy()
        self._vocab_size = vocabulary.size
        self._num_words = -(-vocabulary.size // 32)
        self._eos_token_ids = vocabulary.eos_token_ids
        self._allowed = ~token_bits(banned_token_ids, self._num_words)
        self._is_stuck = False

    def allows(self, token_id: int) -> bool:
        """Whether the grammar goes on with this token; also with one that `fill` leaves out, as it
        sets but one token where only one text may follow.
        """
        if self._is_stuck or token_id >= self._vocab_size:
            return False
        if not self._allowed[token_id // 32] >> token_id % 32 & 1:
            return False
        return not self._matcher.is_error() and self._matcher.validate_tokens([token_id]) == 1

    def fill(self, bitmask: Bitmask) -> None:
        """Write which tokens may come next; words beyond the tokenizer's vocabulary are cleared."""
        words = bitmask[: self._num_words]
        bitmask[self._num_words :] = 0
        if self._matcher.is_error():
            words[:] = 0
        else:
            self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
            words &= self._allowed
        if not words.any():
            # The grammar has nothing left that may be said: end, instead of sampling from nothing.
            self._is_stuck = True
            words |= token_bits(self._eos_token_ids, self._num_words)

    def accept(self, token_id: int) -> None:
        """Move on. A token against the grammar ends it: only an end of answer may follow."""
        if not self._is_stuck and not self._matcher.is_error():
            self._matcher.consume_token(token_id)

    def is_finished(self) -> bool:
        """Nothing but an end of answer may follow."""
        return self._is_stuck or bool(self._matcher.is_stopped())

    @property
    def problem(self) -> str | None:
        """What llguidance says if it gave up, as over its limits in an ambiguous grammar."""
        if self._matcher.is_error():
            return _first_line(self._matcher.get_error())
        return "it asks for a token that no answer may hold" if self._is_stuck else None


class ThoughtMask:
    """Lets one thought pass before `inner`, and closes it after a number of tokens.

    inner    rules of what follows the thought; None for no rules
    budget   most tokens inside a thought; None for no bound

    The thought may also be left out: at the start [THINK] and whatever `inner` allows are open.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        control: ControlTokens,
        inner: Mask | None,
        budget: int | None,
    ) -> None:
        assert control.think is not None
        assert control.end_think is not None
        self._think, self._end_think = control.think, control.end_think
        self._inner = inner
        self._budget = budget
        self._num_words = -(-vocabulary.size // 32)
        # Nor is the padding of the model's head text.
        padding = range(vocabulary.size, self._num_words * 32)
        self._control = token_bits((*vocabulary.control_names, *padding), self._num_words)
        self._end = token_bits((self._end_think,), self._num_words)
        self._token_bytes = vocabulary.token_bytes
        self._num_thought_tokens = 0
        self._pending = b""
        self._state = "start"

    def allows(self, token_id: int) -> bool:
        """Whether this token may come next."""
        if self._state != "thought":
            if self._state == "start" and token_id == self._think:
                return True
            return self._inner is None or self._inner.allows(token_id)
        if token_id == self._end_think:
            return True
        word, bit = divmod(token_id, 32)
        is_text = word < self._num_words and not self._control[word] >> bit & 1
        return is_text and not self._is_spent()

    def fill(self, bitmask: Bitmask) -> None:
        """Write which tokens may come next."""
        words = bitmask[: self._num_words]
        if self._state != "thought":
            if self._inner is None:
                bitmask[:] = 0xFFFFFFFF
            else:
                self._inner.fill(bitmask)
            if self._state == "start":
                words |= token_bits((self._think,), self._num_words)
            return
        bitmask[self._num_words :] = 0
        words[:] = self._end if self._is_spent() else ~self._control | self._end

    def accept(self, token_id: int) -> None:
        """The next token has been chosen."""
        if self._state == "thought":
            self._accept_thought(token_id)
        elif self._state == "start" and token_id == self._think:
            self._state = "thought"
        else:
            self._state = "after"
            if self._inner is not None:
                self._inner.accept(token_id)

    def is_finished(self) -> bool:
        """Nothing but an end of answer may follow."""
        return self._state != "thought" and self._inner is not None and self._inner.is_finished()

    @property
    def problem(self) -> str | None:
        """That of the rules after the thought."""
        return None if self._inner is None else self._inner.problem

    def _is_spent(self) -> bool:
        """A character begun is a character finished: never close a thought inside one.

        Three tokens finish any; a model that only begins characters gets no more than those.
        """
        if self._budget is None:
            return False
        over = self._num_thought_tokens - self._budget
        return over >= 0 and (not self._pending or over >= 3)

    def _accept_thought(self, token_id: int) -> None:
        if token_id == self._end_think:
            self._state = "after"
            return
        self._num_thought_tokens += 1
        self._pending = unfinished_character(self._pending + self._token_bytes[token_id])


def unfinished_character(text: bytes) -> bytes:
    """The bytes at the end that begin a UTF-8 character and do not finish it."""
    for length in range(1, min(3, len(text)) + 1):
        lead = text[-length]
        if lead < 0x80:
            return b""
        if lead >= 0xC0:
            needed = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            return text[-length:] if length < needed else b""
    return b""


def token_bits(token_ids: Sequence[int], num_words: int) -> Bitmask:
    """A bitmask with these ids set; ids past its end are left out."""
    words = np.zeros(num_words, dtype=np.uint32)
    ids = np.asarray([i for i in token_ids if i < num_words * 32], dtype=np.uint32)
    np.bitwise_or.at(words, ids // 32, np.uint32(1) << (ids % 32))
    return words


# What a client may ask for, as Lark grammars. Each returns the text of a grammar for `compile`.


def json_schema_grammar(schema: Mapping[str, Any], *, lenient: bool) -> str:
    """Exactly one JSON value of a schema.

    lenient   keywords that llguidance cannot express become warnings instead of errors
    """
    return f"start: %json {_guided(schema, lenient=lenient)}\n"


def regex_grammar(regex: str) -> str:
    """A text that matches the whole of a regex (Rust syntax, ASCII digits)."""
    return f"start: /{llguidance.regex_to_lark(regex)}/\n"


def choice_grammar(choices: Sequence[str]) -> str:
    """One of some texts."""
    return (
        "start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices) + "\n"
    )


def tools_grammar(
    tools: Sequence[Mapping[str, Any]],
    control: ControlTokens,
    *,
    choice: str,
    parallel: bool,
    answer: str | None = None,
) -> str:
    """Text and tool calls, the arguments of every call held to their schema.

    choice     "auto": text, calls, or text and then calls; "required": calls only; any other
               value is the name of the one function to call, once
    parallel   whether several calls may follow each other
    answer     a grammar of the kind above that replaces the free text of "auto"
    """
    chosen = [tool["function"] for tool in tools]
    if choice not in ("auto", "required"):
        chosen = [function for function in chosen if function["name"] == choice]
        parallel = False
    calls = "call+" if parallel else "call"
    if choice != "auto":
        start = f"start: {calls}"
    elif answer is None:
        start = f"start: TEXT? | TEXT? {calls}"
    else:
        start = f"start: answer | {calls}"
    rules = [start, "TEXT: /(.|\\n)+/"]
    if answer is not None:
        rules.append(answer.strip().replace("start:", "answer:", 1))
    numbers = range(len(chosen))
    names = " | ".join(f"tool_{number}" for number in numbers)
    rules.append(f"call: <[{control.tool_calls}]> ({names})")
    for number, function in zip(numbers, chosen, strict=True):
        schema = function.get("parameters") or {"type": "object", "properties": {}}
        guided = _guided({"type": "object", **schema}, lenient=not function.get("strict"))
        name = json.dumps(function["name"])
        rules.append(f"tool_{number}: {name} <[{control.args}]> %json {guided}")
    return "\n".join(rules) + "\n"


def _guided(schema: Mapping[str, Any], *, lenient: bool) -> str:
    """The schema with our own options; a client's are overwritten, never obeyed."""
    options = {"whitespace_pattern": _WHITE_SPACE, "lenient": lenient}
    return json.dumps({**schema, "x-guidance": options}, ensure_ascii=False)


def _first_line(text: str) -> str:
    """The sentence of an llguidance message, without its listing of the grammar."""
    line = text.strip().splitlines()[0] if text.strip() else "the grammar was refused"
    return line.split(": ", 1)[1] if line.startswith("at ") and ": " in line else line


class _WrappedVocabulary:
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

    def __call__(self, text: bytes | str) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode("utf-8", errors="replace")
        return self._encode_text(text)
