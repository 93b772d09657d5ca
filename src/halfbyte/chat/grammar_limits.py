"""What a grammar may cost, and the one way in which llguidance is asked to build one.

Used by the process that tries a grammar first (`grammar_trial`) and where the engine runs, which
compiles what has passed (`grammar_follow`): both must do the same thing. Imports next to nothing,
so that the process is small and quickly there.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import llguidance


@dataclass(frozen=True, slots=True)
class GrammarLimits:
    """What one schema or grammar may cost; fuel, states and items are llguidance's.

    lexer_fuel       expressions built before the first token; a schema of 1,500 properties takes
                     60,000. They are up to 250 bytes each
    step_fuel        the same for each further mask. It bounds how long one answer's grammar can
                     hold up a step: 2,000 to 14,000 a millisecond. Schemas take up to 13,000
    lexer_states     1 to 2 kB each
    grammar_size     symbols
    row_items        places where an answer may stand in the grammar at once, before the mask gives
                     up; an object of n optional properties has 4 n. The time goes with the square:
                     1,500 properties hold up a step for 30 ms, 2,900 for 125
    free_row_items   the same for grammars that a client wrote: ambiguous rules look at pairs, so
                     2,000 would hold up everybody's step for a tenth of a second
    step_items       such places over all tokens that a mask tries
    max_bytes        most that one compiled grammar may take, and that it may grow by in use
    total_bytes      most that those of all running requests may take together
    cache_bytes      most that those kept for later requests may take together
    passed_chars     of the sources that need not be tried again
    trial_bytes      what the trying process may use beyond what it needs itself
    trial_cpu_s      and for how long it may compute
    trial_stack_bytes  its stack. Where the engine runs, one of four times that is compiled on
    """

    max_source_bytes: int = 262_144
    max_depth: int = 64
    lexer_fuel: int = 500_000
    step_fuel: int = 50_000
    lexer_states: int = 100_000
    grammar_size: int = 500_000
    row_items: int = 6_200
    free_row_items: int = 400
    step_items: int = 50_000
    max_bytes: int = 48_000_000
    total_bytes: int = 256_000_000
    cache_bytes: int = 32_000_000
    passed_chars: int = 8_000_000
    trial_bytes: int = 192_000_000
    trial_cpu_s: float = 1.0
    trial_stack_bytes: int = 4 * 2**20


# llguidance reports that it gave up over a limit in these words.
_GAVE_UP = (
    "too many expressions", "too many states", "Too many items", "items; max is", "fuel exhausted",
    "too big (limit",
)  # fmt: skip


def max_forced_length(longest_token: int) -> int:
    """Length in bytes (or characters) up to which the text that a grammar forces is encoded.

    longest_token  bytes of the longest token

    Sixteen of those: llguidance drops up to four tokens at the end, as what follows might change
    them, and the first must remain.
    """
    return max(1024, 16 * longest_token)


def build(tokenizer: Any, lark: str, limits: GrammarLimits, *, is_free: bool) -> Any:
    """A matcher that has made its first mask, so that nothing of unknown size is left for later.

    Text that a grammar forces, however long, is followed there, with the fuel of the beginning; and
    only a first mask sets the limits of the next. Never raises for a bad grammar: see `fault`.
    """
    matcher = llguidance.LLMatcher(
        tokenizer,
        llguidance.LLMatcher.grammar_from_lark(lark),
        log_level=0,
        limits=llguidance.LLParserLimits(
            initial_lexer_fuel=limits.lexer_fuel,
            step_lexer_fuel=limits.step_fuel,
            max_lexer_states=limits.lexer_states,
            max_grammar_size=limits.grammar_size,
            max_items_in_row=limits.free_row_items if is_free else limits.row_items,
            step_max_items=limits.step_items,
            # `work_done` reads them.
            verbose_errors=True,
        ),
    )
    if not matcher.is_error():
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        # A limit that was passed is reported by the next step only.
        if mask and not matcher.is_stopped():
            ahead = matcher.deep_copy()
            ahead.consume_token((mask & -mask).bit_length() - 1)
            if ahead.is_error():
                return ahead
    return matcher


def fault(matcher: Any) -> str | None:
    """Why a matcher of `build` is not one, as a sentence; None if it is."""
    if not matcher.is_error():
        return None
    message = sentence(matcher.get_error())
    if any(words in message for words in _GAVE_UP):
        return f"it is too complex to be followed ({message}); make repetitions shorter"
    return message


def sentence(text: str) -> str:
    """The sentence of an llguidance message, without its listings of grammar and state."""
    text = re.split(r"\n<(?:state|grammar|non-verbose)", text.strip())[0].strip()
    lines = [line.strip() for line in text.splitlines()]
    # What follows is the source, line by line, with numbers.
    lines = [line for line in lines if not re.match(r"\d+ \||\^+$", line)]
    if not lines:
        return "the grammar was refused"
    first = lines[0]
    if first.endswith(":"):
        reasons = [line for line in lines[1:] if line.startswith("error:")]
        first = f"{first} {(reasons or lines[-1:])[-1].removeprefix('error: ')}"
    if re.match(r"at \d+\(\d+\): ", first):
        first = first.split(": ", 1)[1]
    first = first.removeprefix("failed to compile JSON schema: ")
    if first.startswith("NoExtension"):
        return "no text fits it"
    if "coerce_one_of" in first:
        return (
            "oneOf cannot be held where more than one of its alternatives may fit; use anyOf, or "
            "leave strict out, which reads it as anyOf"
        )
    return first


def work_done(matcher: Any, odd_token_ids: Iterable[int]) -> tuple[int, int] | None:
    """Expressions paid for by the lexer of a matcher, and places looked at by its parser.

    llguidance says so in the message of an error only, so a copy is given tokens that hardly ever
    fit, one after the other, until one does not. None if the message is not understood.
    """
    copy = matcher.deep_copy()
    for token_id in odd_token_ids:
        if not copy.is_error():
            copy.consume_token(token_id)
    found = [
        re.search(rf'"{name}": (\d+)', copy.get_error()) for name in ("lexer_cost", "all_items")
    ]
    if found[0] is None or found[1] is None:
        return None
    return int(found[0][1]), int(found[1][1])
