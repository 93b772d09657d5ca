import contextlib
import dataclasses
import gc
import itertools
import json
import time
import weakref
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.chat.grammar import GrammarCompiler
from halfbyte.chat.grammar_follow import GrammarMasks
from halfbyte.chat.grammar_limits import GrammarLimits, max_forced_length, work_done
from halfbyte.chat.grammar_masks import (
    CheckedGrammar,
    Mask,
    ThoughtMask,
    token_bits,
    unfinished_character,
)
from halfbyte.chat.grammar_texts import (
    choice_grammar,
    json_schema_grammar,
    regex_grammar,
    tools_grammar,
)
from halfbyte.chat.mistral_format import MistralFormat
from halfbyte.chat.prompt import ControlTokens
from halfbyte.chat.template_format import TemplateFormat
from halfbyte.errors import RequestError

THINK, END_THINK, CALLS, ARGS, EOS = 34, 35, 9, 32, 2
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "f"}},
]


@pytest.fixture(scope="module")
def compiler(mistral: MistralFormat) -> GrammarCompiler:
    return GrammarCompiler(mistral.vocabulary)


def allowed(mask: Mask, size: int = 764) -> set[int]:
    bitmask = np.zeros(-(-size // 32), dtype=np.uint32)
    mask.fill(bitmask)
    return {i for i in range(size) if bitmask[i // 32] >> np.uint32(i % 32) & 1}


def accepts(mask: Mask, mistral: MistralFormat, *parts: str | int) -> bool:
    """Whether the mask allows every token, and then an end of answer."""
    ids: list[int] = []
    for part in parts:
        ids += [part] if isinstance(part, int) else mistral.vocabulary.encode_text(part)
    for token_id in ids:
        if token_id not in allowed(mask):
            return False
        mask.accept(token_id)
    return EOS in allowed(mask)


def tool_mask(compiler: GrammarCompiler, mistral: MistralFormat, **options: Any) -> Mask:
    options = {"choice": "auto", "parallel": True, **options}
    lark = tools_grammar(TOOLS, mistral.control, **options)
    return compiler.mask(compiler.compile(lark, "tools"))


CALL = (CALLS, "get_weather", ARGS, '{"city": "Paris"}')


@pytest.mark.parametrize(
    ("choice", "parallel", "parts", "expected"),
    [
        ("auto", True, ("Hello",), True),
        ("auto", True, (), True),
        ("auto", True, CALL, True),
        ("auto", True, ("Let me see.", *CALL, *CALL), True),
        ("auto", True, (CALLS, "f", ARGS, "{}"), True),
        ("auto", False, (*CALL, *CALL), False),
        ("auto", True, (CALLS, "nobody", ARGS, "{}"), False),
        ("auto", True, (CALLS, "get_weather", ARGS, '{"town": "x"}'), False),
        ("auto", True, (CALLS, "get_weather", ARGS, "{}"), False),
        ("auto", True, (THINK, "x", END_THINK), False),
        ("required", True, ("Hello",), False),
        ("required", True, (*CALL, *CALL), True),
        ("required", True, (), False),
        ("get_weather", True, CALL, True),
        ("get_weather", True, (*CALL, *CALL), False),
        ("get_weather", True, (CALLS, "f", ARGS, "{}"), False),
    ],
)
def test_tool_choices(
    compiler: GrammarCompiler,
    mistral: MistralFormat,
    choice: str,
    parallel: bool,
    parts: tuple[str | int, ...],
    expected: bool,
) -> None:
    mask = tool_mask(compiler, mistral, choice=choice, parallel=parallel)
    assert accepts(mask, mistral, *parts) is expected


def test_schema_and_tools_allow_either(compiler: GrammarCompiler, mistral: MistralFormat) -> None:
    answer = json_schema_grammar(CITY, lenient=False)
    for parts, expected in ((('{"city": "x"}',), True), (CALL, True), (("text",), False)):
        mask = tool_mask(compiler, mistral, answer=answer)
        assert accepts(mask, mistral, *parts) is expected


def test_json_schema_regex_and_choice(compiler: GrammarCompiler, mistral: MistralFormat) -> None:
    cases = [
        (json_schema_grammar(CITY, lenient=False), '{"city":\n "é"}', "{}"),
        (regex_grammar(r"\d{3}-[a-z/]+"), "123-a/b", "12-a"),
        (choice_grammar(['say "hi"', "no\n"]), 'say "hi"', "maybe"),
    ]
    for lark, good, bad in cases:
        grammar = compiler.compile(lark, "response_format")
        assert accepts(compiler.mask(grammar), mistral, good)
        assert not accepts(compiler.mask(grammar), mistral, bad)


@pytest.mark.parametrize("regex", [r"\d{2}", r"[0-9]-?\d", r"(\d|x)+", r"[\d]{2}", r"\d+(\.\d+)?"])
@pytest.mark.parametrize("digits", ["\u0661\u0662", "\u0be6\u0be7", "\uff11\uff12", "\U0001d7ce2"])
def test_digits_of_a_regex_are_ascii(
    compiler: GrammarCompiler, mistral: MistralFormat, regex: str, digits: str
) -> None:
    grammar = compiler.compile(regex_grammar(regex), "regex")
    assert accepts(compiler.mask(grammar), mistral, "12")
    assert not accepts(compiler.mask(grammar), mistral, digits)


def test_a_choice_may_hold_any_character(compiler: GrammarCompiler, mistral: MistralFormat) -> None:
    characters = [chr(code) for code in (*range(1, 0x180), *range(0x2000, 0x2070))]
    characters += ["\ufeff", "\ufffd", "\uffff", "\ue000", "\U0001f600", "\U0010ffff"]
    choices = [f"a{character}b" for character in characters]
    grammar = compiler.compile(choice_grammar(choices), "choices")
    for choice in choices:
        mask = compiler.mask(grammar)
        ids = mistral.vocabulary.encode_text(choice)
        assert mask.begin(ids) == len(ids) and EOS in allowed(mask), repr(choice)
    assert not accepts(compiler.mask(grammar), mistral, "ab")


def test_of_two_choices_one_may_begin_the_other(
    compiler: GrammarCompiler, mistral: MistralFormat
) -> None:
    grammar = compiler.compile(choice_grammar(["ab", "abc", "a"]), "choices")
    for text, fits in (("a", True), ("ab", True), ("abc", True), ("abcd", False), ("b", False)):
        assert accepts(compiler.mask(grammar), mistral, text) is fits


def test_ten_thousand_choices_cost_little(
    compiler: GrammarCompiler, mistral: MistralFormat
) -> None:
    choices = [f"label {number} of {number * number}" for number in range(9000)]
    grammar = compiler.compile(choice_grammar(choices), "choices")
    assert accepts(compiler.mask(grammar), mistral, choices[-1])
    assert grammar.num_bytes < 20_000_000


def test_a_call_has_its_id_where_the_format_has_one(
    compiler: GrammarCompiler, mistral: MistralFormat
) -> None:
    call_id = 33
    control = dataclasses.replace(mistral.control, call_id=call_id)
    lark = tools_grammar(TOOLS, control, choice="required", parallel=True)
    grammar = compiler.compile(lark, "tools")
    call = (CALLS, "get_weather", call_id, "Ab3456789", ARGS, '{"city": "Paris"}')
    assert accepts(compiler.mask(grammar), mistral, *call, *call)
    assert not accepts(compiler.mask(grammar), mistral, *CALL)
    short = (CALLS, "get_weather", call_id, "Ab345678", ARGS, '{"city": "Paris"}')
    assert not accepts(compiler.mask(grammar), mistral, *short)


def test_a_format_without_calls_is_refused(mistral: MistralFormat) -> None:
    with pytest.raises(RequestError, match="no tool calls"):
        tools_grammar(TOOLS, ControlTokens(), choice="auto", parallel=True)


@pytest.mark.parametrize("kind", [["object", "null"], ["null", "array", "object"], None, "object"])
def test_arguments_are_an_object_whatever_the_schema_says(
    compiler: GrammarCompiler, mistral: MistralFormat, kind: Any
) -> None:
    function = {"name": "f", "parameters": {**CITY, "type": kind}}
    lark = tools_grammar([{"function": function}], mistral.control, choice="f", parallel=False)
    grammar = compiler.compile(lark, "tools")
    assert accepts(compiler.mask(grammar), mistral, CALLS, "f", ARGS, '{"city": "x"}')
    for text in ("null", "[]", '"x"', "1"):
        assert not accepts(compiler.mask(grammar), mistral, CALLS, "f", ARGS, text)


@pytest.mark.parametrize(
    ("lark", "begun", "rest"),
    [
        (json_schema_grammar(CITY, lenient=False), '{"ci', 'ty": "x"}'),
        (regex_grammar("[0-9]{4}"), "12", "34"),
        (choice_grammar(["yes", "no"]), "ye", "s"),
        (choice_grammar(["yes", "no"]), "no", ""),
        ("tools", "Let me", " see"),
    ],
    ids=["schema", "regex", "choice", "whole", "tools"],
)
def test_an_answer_that_has_begun_goes_on(
    compiler: GrammarCompiler, mistral: MistralFormat, lark: str, begun: str, rest: str
) -> None:
    if lark == "tools":
        lark = tools_grammar(TOOLS, mistral.control, choice="auto", parallel=True)
    grammar = compiler.compile(lark, "p")
    mask = compiler.mask(grammar)
    ids = mistral.vocabulary.encode_text(begun)
    assert mask.begin(ids) == len(ids)
    assert accepts(mask, mistral, rest)
    wrong = compiler.mask(grammar)
    assert wrong.begin([*ids, CALLS + 1, *ids]) == len(ids)


def test_a_long_beginning_is_taken_in_pieces(
    compiler: GrammarCompiler, mistral: MistralFormat
) -> None:
    mask = compiler.mask(compiler.compile(regex_grammar("[0-9 ]{10,2000}x"), "p"))
    ids = mistral.vocabulary.encode_text("1234567890 " * 100)
    assert len(ids) > 300
    assert mask.begin(ids) == len(ids) and accepts(mask, mistral, "x")
    late = compiler.mask(compiler.compile(regex_grammar("[0-9]{10,2000}x"), "p"))
    assert late.begin([*mistral.vocabulary.encode_text("1" * 700), 64 + ord("y")]) >= 300


@given(
    words=st.lists(st.text("ab \u00e9\n", min_size=1, max_size=40), min_size=1, max_size=5),
    times=st.integers(200, 400),
)
@settings(max_examples=10, deadline=None)
def test_long_forced_text_is_looked_at_a_little_ahead(
    mistral: MistralFormat, words: list[str], times: int
) -> None:
    """Each token is the one of the whole text, and encoding all of it costs no square."""
    asked: list[int] = []

    def encode(text: str) -> list[int]:
        asked.append(len(text))
        return mistral.vocabulary.encode_text(text)

    text = "x" + "".join(words) * times
    vocabulary = dataclasses.replace(mistral.vocabulary, encode_text=encode)
    bound = max_forced_length(max(map(len, vocabulary.token_bytes)))
    checked = CheckedGrammar(choice_grammar([text]), False, 1, (), "p")
    mask = GrammarMasks(vocabulary).mask(checked)
    for token_id in mistral.vocabulary.encode_text(text)[:40]:
        assert token_id in allowed(mask)
        mask.accept(token_id)
    assert max(asked) <= bound


def test_white_space_inside_json_has_a_bound(
    compiler: GrammarCompiler, mistral: MistralFormat
) -> None:
    grammar = compiler.compile(json_schema_grammar(CITY, lenient=False), "p")
    assert not accepts(compiler.mask(grammar), mistral, "{" + " " * 100 + '"city": "x"}')


def test_unsupported_keywords_are_refused_or_named(compiler: GrammarCompiler) -> None:
    schema = {**CITY, "not": {"required": ["x"]}, "x-guidance": {"lenient": True}}
    with pytest.raises(RequestError, match="not") as caught:
        compiler.compile(json_schema_grammar(schema, lenient=False), "response_format")
    assert caught.value.param == "response_format"
    lenient = compiler.compile(json_schema_grammar(schema, lenient=True), "response_format")
    assert any("not" in warning for warning in lenient.warnings)


@pytest.mark.parametrize("regex", ["(", "(?=x)"])
def test_regex_that_cannot_be_expressed_is_refused(compiler: GrammarCompiler, regex: str) -> None:
    with pytest.raises(RequestError):
        compiler.compile(regex_grammar(regex), "regex")


@pytest.mark.parametrize("regex", ["a{1,1000000}{1,1000000}", "(a*)*(a*)*b", "((a|b|c)*d){500}"])
def test_hostile_regex_costs_little(compiler: GrammarCompiler, regex: str) -> None:
    start = time.perf_counter()
    with contextlib.suppress(RequestError):
        mask = compiler.mask(compiler.compile(regex_grammar(regex), "regex"))
        allowed(mask)
    assert time.perf_counter() - start < 3


AMBIGUOUS = 'start: a\na: a a | "x" | a a a\n'


def test_ambiguous_grammar_gives_up_and_says_so_before_it_holds_up_a_step(
    compiler: GrammarCompiler, mistral: MistralFormat
) -> None:
    x = 64 + ord("x")
    mask = compiler.mask(compiler.compile(AMBIGUOUS, "p", is_free=True))
    assert accepts(mask, mistral, "xxxx") and mask.problem is None
    slowest, count = 0.0, 0
    while x in allowed(mask) and count < 400:
        start = time.perf_counter()
        mask.fill(np.zeros(24, dtype=np.uint32))
        mask.accept(x)
        slowest, count = max(slowest, time.perf_counter() - start), count + 1
    assert count < 400 and slowest < 1
    assert mask.problem is not None and "items" in mask.problem
    # What is left is to end; who asks whether it is finished hears that it is.
    assert allowed(mask) == {EOS} and mask.is_finished()
    thoughtful = ThoughtMask(mistral.vocabulary, mistral.control, mask, None)
    assert thoughtful.problem == mask.problem


def test_many_optional_properties_are_not_taken_for_ambiguity(
    compiler: GrammarCompiler, mistral: MistralFormat
) -> None:
    properties = {f"key{i}": {"type": "integer"} for i in range(1500)}
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    mask = compiler.mask(compiler.compile(json_schema_grammar(schema, lenient=False), "p"))
    assert accepts(mask, mistral, '{"key1499": 1}') and mask.problem is None


@pytest.mark.parametrize(
    "schema",
    [
        {"enum": [[]] * 3_000_000},
        {"description": "x" * 300_000},
        {"properties": {"x" * 300_000: {}}},
        {f"{i}": {} for i in range(100_000)},
    ],
    ids=["wide", "text", "key", "keys"],
)
def test_large_schemas_are_refused_at_a_glance(compiler: GrammarCompiler, schema: Any) -> None:
    start = time.perf_counter()
    with pytest.raises(RequestError, match="262,144 bytes"):
        compiler.check_schema(schema, "p")
    assert time.perf_counter() - start < 1


def test_limits_name_themselves(mistral: MistralFormat) -> None:
    compiler = GrammarCompiler(mistral.vocabulary, GrammarLimits(max_source_bytes=100, max_depth=3))
    with pytest.raises(RequestError, match="100 bytes"):
        compiler.compile("start: " + "x" * 200, "p")
    deep: Any = {}
    for _ in range(5):
        deep = {"items": deep}
    with pytest.raises(RequestError, match="deeper than 3"):
        compiler.check_schema(deep, "p")
    compiler.check_schema({"a": [{"b": "c"}]}, "p")


def test_compiled_grammars_are_kept_and_masks_are_independent(
    compiler: GrammarCompiler, mistral: MistralFormat
) -> None:
    lark = choice_grammar(["ab", "cd"])
    grammar = compiler.compile(lark, "p")
    assert compiler.compile(lark, "p") == grammar and compiler.compile(lark, "q").param == "q"
    first, second = compiler.mask(grammar), compiler.mask(grammar)
    assert first._grammar is second._grammar
    first.accept(mistral.vocabulary.encode_text("ab")[0])
    assert allowed(first) != allowed(second)


def test_a_grammar_that_grows_in_use_is_dropped_and_says_so(
    mistral: MistralFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = GrammarCompiler(mistral.vocabulary, GrammarLimits(max_bytes=10_000_000))
    lark = choice_grammar(["abcdef", "xyz"])
    grammar = compiler.compile(lark, "p")
    resident = itertools.count(0, 3_000_000)
    monkeypatch.setattr(compiler.masks, "memory_bytes", lambda: next(resident))
    # Something else takes memory: llguidance has done next to nothing, and is believed.
    mask = compiler.mask(grammar)
    assert accepts(mask, mistral, "abcdef") and mask.problem is None
    monkeypatch.setattr("halfbyte.chat.grammar_follow.work_done", lambda *_: (10**6, 0))
    first, second = compiler.mask(grammar), compiler.mask(grammar)
    for token_id in mistral.vocabulary.encode_text("abc"):
        assert token_id in allowed(first) or first.problem is not None
        first.accept(token_id)
    assert first.problem is not None and "took more than" in first.problem
    # Nor can those go on who share it; the next request gets a fresh one.
    assert allowed(second) == {EOS} and second.is_finished() and second.problem == first.problem
    assert not first.allows(64 + ord("d"))
    assert allowed(compiler.mask(grammar)) != {EOS}


def test_a_grammar_that_has_failed_is_not_kept(
    mistral: MistralFormat,
) -> None:
    compiler = GrammarCompiler(mistral.vocabulary)
    grammar = compiler.compile(AMBIGUOUS, "p", is_free=True)
    mask = compiler.mask(grammar)
    gone = weakref.ref(mask._grammar)
    while mask.problem is None:
        mask.fill(np.zeros(24, dtype=np.uint32))
        mask.accept(64 + ord("x"))
    del grammar
    gc.collect()
    assert gone() is None and not compiler.masks._cache


def test_llguidance_says_how_much_it_has_done(
    compiler: GrammarCompiler, mistral: MistralFormat
) -> None:
    """Read from the message of an error: another version may word it otherwise."""
    grammar = compiler.compile(regex_grammar("[a-z]{1,400}x"), "p")
    matcher = compiler.mask(grammar)._matcher
    before = work_done(matcher, [1, EOS])
    assert before is not None and before[0] > 0
    for _ in range(50):
        matcher.compute_bitmask()
        matcher.consume_token(64 + ord("a"))
    after = work_done(matcher, [1, EOS])
    assert after is not None and after[0] > before[0] and not matcher.is_error()


def test_banned_ids_stay_banned_and_never_leave_nothing(
    compiler: GrammarCompiler,
) -> None:
    grammar = compiler.compile("start: <[3]>\n", "p")
    assert allowed(compiler.mask(grammar)) == {3}
    stuck = compiler.mask(grammar, banned_token_ids=(3,))
    assert stuck.problem is None
    assert allowed(stuck) == {EOS} and stuck.is_finished()
    assert stuck.problem == "it asks for a token that no answer may hold"


def test_token_against_the_grammar_ends_the_answer(
    compiler: GrammarCompiler, mistral: MistralFormat
) -> None:
    mask = compiler.mask(compiler.compile(choice_grammar(["ab"]), "p"))
    mask.accept(64 + ord("z"))
    assert allowed(mask) == {EOS} and mask.is_finished()


def test_padding_of_the_models_head_is_never_allowed(
    compiler: GrammarCompiler, mistral: MistralFormat
) -> None:
    mask = compiler.mask(compiler.compile(choice_grammar(["ab"]), "p"))
    bitmask = np.full(40, 0xFFFFFFFF, dtype=np.uint32)
    mask.fill(bitmask)
    assert not bitmask[24:].any()


@pytest.mark.parametrize(
    ("lark", "banned", "parts"),
    [
        (json_schema_grammar(CITY, lenient=False), (EOS, 64 + ord("z")), ('{"city": "Zürich 8"}',)),
        (regex_grammar("[ab]{2,9}c?"), (), ("ababb",)),
        (choice_grammar(["ab", "abc", "x y"]), (), ("ab",)),
        ("start: <[3]>\n", (3,), ()),
        ("tools", (), CALL),
    ],
    ids=["schema", "regex", "choice", "stuck", "tools"],
)
@pytest.mark.parametrize("thinks", [False, True])
def test_one_token_is_judged_as_all_are(
    lark: str,
    banned: tuple[int, ...],
    parts: tuple[str | int, ...],
    thinks: bool,
    compiler: GrammarCompiler,
    mistral: MistralFormat,
) -> None:
    """Beyond what `fill` sets, `allows` takes only other cuts of the one text that may follow."""
    if lark == "tools":
        lark = tools_grammar(TOOLS, mistral.control, choice="auto", parallel=True)
    ids = [THINK, 64 + ord("h"), 64 + 0xC3, 64 + 0xA9, END_THINK] if thinks else []
    for part in parts:
        ids += [part] if isinstance(part, int) else mistral.vocabulary.encode_text(part)

    def fresh() -> Mask:
        mask: Mask = compiler.mask(compiler.compile(lark, "p"), banned)
        return ThoughtMask(mistral.vocabulary, mistral.control, mask, 3) if thinks else mask

    num_more = 0
    for count in range(len(ids) + 1):
        first, second = fresh(), fresh()
        padded = np.full(25, 0xFFFFFFFF, dtype=np.uint32)
        first.fill(padded)
        assert not padded[23] >> 28 and not padded[24]
        for token_id in ids[:count]:
            first.accept(token_id)
            second.accept(token_id)
        singly = {token_id for token_id in range(800) if first.allows(token_id)}
        together = allowed(second)
        if second.problem is None:
            assert together <= singly
            num_more += len(singly - together)
        # What was asked has left no trace.
        assert allowed(first) == together
        assert singly == together or len(together) == 1 or second.problem is not None
        assert thinks or not singly & set(banned)
        for token_id in singly - together:
            third = fresh()
            for known in [*ids[:count], token_id]:
                third.accept(known)
            assert third.problem is None and not allowed(third) & set(banned)
    assert num_more < 40


def test_thought_passes_before_the_schema(
    compiler: GrammarCompiler, mistral: MistralFormat
) -> None:
    grammar = compiler.compile(json_schema_grammar(CITY, lenient=False), "p")

    def fresh(budget: int | None = None) -> ThoughtMask:
        inner = compiler.mask(grammar)
        return ThoughtMask(mistral.vocabulary, mistral.control, inner, budget)

    assert accepts(fresh(), mistral, THINK, "anything {", END_THINK, '{"city": "x"}')
    assert accepts(fresh(), mistral, '{"city": "x"}')
    assert not accepts(fresh(), mistral, THINK, "a", END_THINK, "b")
    assert not accepts(fresh(), mistral, THINK, "a", END_THINK, THINK, "b", END_THINK)
    assert not accepts(fresh(), mistral, THINK, "a", CALLS)


def test_budget_closes_the_thought_but_not_inside_a_character(mistral: MistralFormat) -> None:
    mask = ThoughtMask(mistral.vocabulary, mistral.control, None, 2)
    for token_id in (THINK, 64 + ord("a")):
        mask.accept(token_id)
    assert len(allowed(mask)) > 1
    mask.accept(64 + 0xC3)
    assert END_THINK in allowed(mask) and len(allowed(mask)) > 1
    mask.accept(64 + 0xA9)
    assert allowed(mask) == {END_THINK}
    mask.accept(END_THINK)
    assert len(allowed(mask)) == 764


def test_a_model_that_never_finishes_a_character_cannot_stretch_its_budget(
    mistral: MistralFormat,
) -> None:
    mask = ThoughtMask(mistral.vocabulary, mistral.control, None, 2)
    mask.accept(THINK)
    for _ in range(2 + 3):
        assert len(allowed(mask)) > 1
        mask.accept(64 + 0xE6)
    assert allowed(mask) == {END_THINK}


def test_a_budget_of_zero_still_closes_the_thought(mistral: MistralFormat) -> None:
    mask = ThoughtMask(mistral.vocabulary, mistral.control, None, 0)
    mask.accept(THINK)
    assert allowed(mask) == {END_THINK}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"a", b""),
        (b"a\xc3", b"\xc3"),
        ("é".encode(), b""),
        ("漢".encode()[:2], "漢".encode()[:2]),
        ("漢".encode(), b""),
        ("😀".encode()[:3], "😀".encode()[:3]),
        (b"\xa9", b""),
        (b"\xa9\xa9\xa9\xa9", b""),
    ],
)
def test_unfinished_character(text: bytes, expected: bytes) -> None:
    assert unfinished_character(text) == expected


def test_bits() -> None:
    assert token_bits((0, 33, 33, 99), 2).tolist() == [1, 2]


def test_model_without_control_tokens_can_be_held_to_json(chatml: TemplateFormat) -> None:
    compiler = GrammarCompiler(chatml.vocabulary)
    mask = compiler.mask(compiler.compile(json_schema_grammar(CITY, lenient=False), "p"))
    for token_id in chatml.vocabulary.encode_text(json.dumps({"city": "Rome"})):
        assert token_id in allowed(mask, 500)
        mask.accept(token_id)
    assert allowed(mask, 500) == {2} and mask.is_finished()
