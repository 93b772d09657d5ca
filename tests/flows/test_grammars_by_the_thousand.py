"""Whatever grammar is sent: the process lives, keeps little, and ordinary ones are held."""

import contextlib
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flows.grammars import Made, hostile, ordinary
from halfbyte.chat.grammar import GrammarCompiler
from halfbyte.chat.grammar_masks import CheckedGrammar
from halfbyte.chat.grammar_texts import (
    choice_grammar,
    json_schema_grammar,
    regex_grammar,
    tools_grammar,
)
from halfbyte.chat.mistral_format import MistralFormat
from halfbyte.chat.tokens import load_chat
from halfbyte.errors import RequestError

DATA = Path(__file__).parent.parent / "data" / "chat"
CALLS, ARGS, EOS = 9, 32, 2


@pytest.fixture(autouse=True, scope="module")
def kept() -> None:
    """Nothing is: the processes themselves are looked at."""


@pytest.fixture(scope="module")
def chat() -> MistralFormat:
    chat = load_chat(DATA / "tekken")
    assert isinstance(chat, MistralFormat)
    return chat


@pytest.fixture
def compiler(chat: MistralFormat) -> GrammarCompiler:
    return GrammarCompiler(chat.vocabulary)


def compiled(compiler: GrammarCompiler, chat: MistralFormat, made: Made) -> CheckedGrammar:
    if made.kind == "regex":
        return compiler.compile(regex_grammar(made.source), "regex")
    if made.kind == "choice":
        return compiler.compile(choice_grammar(made.source), "choices")
    if made.kind == "lark":
        return compiler.compile(made.source, "grammar", is_free=True)

    def write(schemas: Sequence[Mapping[str, Any]]) -> str:
        if made.kind == "schema":
            return json_schema_grammar(schemas[0], lenient=not made.strict)
        function = {"name": "f", "parameters": schemas[0], "strict": made.strict}
        return tools_grammar([{"function": function}], chat.control, choice="f", parallel=False)

    return compiler.compile_schemas([made.held()], write, made.kind)[0]


def say(compiler: GrammarCompiler, chat: MistralFormat, grammar: CheckedGrammar, made: Made) -> str:
    """Where the text that fits is refused; nothing if it is not."""
    assert made.fits is not None
    ids = chat.vocabulary.encode_text(made.fits)
    if made.kind == "tool":
        ids = [CALLS, *chat.vocabulary.encode_text("f"), ARGS, *ids]
    mask = compiler.mask(grammar)
    for position, token_id in enumerate(ids):
        if not mask.allows(token_id):
            return f"{made}: stops at token {position}"
        mask.accept(token_id)
    return "" if mask.allows(EOS) or mask.is_finished() else f"{made}: does not end"


def follow(compiler: GrammarCompiler, grammar: CheckedGrammar, rng: random.Random) -> None:
    """A few steps of an answer, as the engine takes them; the words are never empty."""
    mask = compiler.mask(grammar)
    words = np.zeros(24, dtype=np.uint32)
    for _ in range(12):
        if mask.is_finished():
            return
        mask.fill(words)
        allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
        assert len(allowed)
        if mask.is_finished():
            return
        mask.accept(int(rng.choice(allowed)))


def survive(
    compiler: GrammarCompiler, chat: MistralFormat, cases: Iterator[tuple[Made, random.Random]]
) -> list[str]:
    """Compile and follow all of them; what was wrong."""
    wrong = []
    for made, rng in cases:
        started = time.perf_counter()
        if made.fits is None:
            with contextlib.suppress(RequestError):
                follow(compiler, compiled(compiler, chat, made), rng)
        else:
            try:
                grammar = compiled(compiler, chat, made)
            except RequestError as error:
                wrong.append(f"{made}: refused: {error}")
                continue
            problem = say(compiler, chat, grammar, made)
            wrong += [problem] if problem else []
        # One second of a trial, another in the server; and the machine may be busy.
        if time.perf_counter() - started > 30:
            wrong.append(f"{made.name}: took {time.perf_counter() - started:.1f} s")
    return wrong


def cases(count: int, dear_every: int) -> Iterator[tuple[Made, random.Random]]:
    for number in range(count):
        rng = random.Random(number)
        if number % dear_every == dear_every - 1:
            yield hostile(rng, dear=True), rng
        elif number % 2:
            yield hostile(rng, dear=False), rng
        else:
            yield ordinary(rng), rng


def resident_mb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1000
    raise AssertionError("no VmRSS")


@pytest.mark.timeout(180)
def test_every_grammar_is_survived_and_ordinary_ones_are_held(
    compiler: GrammarCompiler, chat: MistralFormat
) -> None:
    check(compiler, chat, cases(300, dear_every=30))


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_ten_thousand_grammars(compiler: GrammarCompiler, chat: MistralFormat) -> None:
    check(compiler, chat, cases(10_000, dear_every=20))


def check(
    compiler: GrammarCompiler, chat: MistralFormat, made: Iterator[tuple[Made, random.Random]]
) -> None:
    """All of them are survived, nothing is kept of them, and the next one gets its answer."""
    compiled(compiler, chat, Made("first", "choice", ["a"]))
    before = resident_mb()
    wrong = survive(compiler, chat, made)
    assert not wrong, f"{len(wrong)}: " + "\n".join(wrong[:20])
    deadline = time.monotonic() + 10
    # What is dropped is given back a moment later.
    while resident_mb() - before > 100 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert resident_mb() - before < 100
    assert compiler.masks.used_bytes() < 64_000_000
    # And there is an answer for the next one.
    last = Made("last", "schema", {"type": "object", "properties": {"z": {}}}, "{}")
    assert not say(compiler, chat, compiled(compiler, chat, last), last)
