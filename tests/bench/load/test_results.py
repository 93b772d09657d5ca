"""Figures of made-up events equal those worked out by hand."""

import itertools
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.bench.load.client import Exchange
from halfbyte.bench.load.results import LevelResult, load_figures, saturation, summarise_level
from halfbyte.bench.load.run import LevelExchange, Measured
from halfbyte.bench.load.traffic import Level, Profile, Session, Turn


def level(profile: Profile = "fixed", users: int = 1) -> Level:
    session = Session((Turn(0.0, "user", 10, 1, 4),))
    beside = Session((Turn(0.0, "user", 1000, 2, 4),)) if profile == "beside" else None
    return Level(profile, tuple((session,) for _ in range(users)), beside)


def exchange(started: float, *events: float, prompt: int | None = 10, answer: int | None = None,
             cached: int | None = None, error: str = "") -> Exchange:  # fmt: skip
    counted = len(events) if answer is None and prompt is not None else answer
    ended = events[-1] if events else started
    return Exchange(started, ended, list(events), prompt, counted, cached, error=error)


def measured(*exchanges: Exchange, ended: float = 10.0, profile: Profile = "fixed") -> Measured:
    samples = [LevelExchange(0, 0, one) for one in exchanges]
    return Measured(level(profile), 0.0, ended, samples)


def test_a_worked_example() -> None:
    found = summarise_level(
        measured(
            exchange(0.0, 1.0, 1.1, 1.3, prompt=100, cached=80),
            exchange(2.0, 2.5, 2.6, 2.9, 3.0, prompt=300, cached=0),
            exchange(4.0, prompt=None, error="status 429"),
            ended=4.0,
        )
    )
    assert found.first_token is not None
    assert found.gaps is not None
    assert found.per_token is not None
    assert (found.answered, found.failed) == (2, 1)
    assert found.first_token.most == pytest.approx(1000)
    # Of two values by rank: the first is the median, the last the 99th percentile.
    assert (found.first_token.p50, found.first_token.p99) == pytest.approx((500, 1000))
    # 100 200 | 100 300 100
    assert (found.gaps.p50, found.gaps.most) == pytest.approx((100, 300))
    assert found.gaps.count == 5
    # 0.3 s over 2 tokens; 0.5 s over 3
    assert found.per_token.most == pytest.approx(500 / 3)
    assert found.output_rate == pytest.approx(7 / 4)
    assert found.prompt_rate == pytest.approx(400 / 4)
    assert found.found_share == pytest.approx(80 / 400)
    assert found.prompt_per_answer == pytest.approx(400 / 7)


moments = st.lists(st.floats(0.001, 2.0), min_size=1, max_size=30)


@given(
    answers=st.lists(
        st.tuples(st.floats(0, 5), moments, st.integers(1, 5000), st.integers(0, 3)),
        min_size=1,
        max_size=8,
    )
)
@settings(max_examples=80)
def test_figures_are_those_of_the_events(
    answers: list[tuple[float, list[float], int, int]],
) -> None:
    exchanges = []
    for started, gaps, prompt, textless in answers:
        events = [started + sum(gaps[: n + 1]) for n in range(len(gaps))]
        # Some tokens have no text of their own: the server counts more than came in pieces.
        exchanges.append(exchange(started, *events, prompt=prompt, answer=len(gaps) + textless))
    ended = max(one.ended for one in exchanges)
    found = summarise_level(measured(*exchanges, ended=ended))
    waits = sorted(gaps[0] * 1000 for _, gaps, _, _ in answers)
    between = sorted(gap * 1000 for _, gaps, _, _ in answers for gap in gaps[1:])
    assert found.first_token is not None
    assert found.first_token.most == pytest.approx(waits[-1], abs=1e-6)
    # The nearest rank lies between the values on both sides of the middle.
    assert waits[(len(waits) - 1) // 2] - 1e-6 <= found.first_token.p50
    assert found.first_token.p50 <= waits[len(waits) // 2] + 1e-6
    if between:
        assert found.gaps is not None
        assert found.gaps.count == len(between)
        assert found.gaps.most == pytest.approx(between[-1], abs=1e-6)
        assert found.gaps.p50 <= found.gaps.p99 <= found.gaps.most
        assert sum(gap <= found.gaps.p99 + 1e-6 for gap in between) >= 0.98 * len(between)
    else:
        assert found.gaps is None
    tokens = sum(len(gaps) + textless for _, gaps, _, textless in answers)
    assert found.output_rate == pytest.approx(tokens / ended)
    assert found.prompt_rate == pytest.approx(sum(p for _, _, p, _ in answers) / ended)
    spans = [
        sum(gaps[1:]) * 1000 / (len(gaps) + textless - 1)
        for _, gaps, _, textless in answers
        if len(gaps) + textless > 1
    ]
    if spans:
        assert found.per_token is not None
        assert found.per_token.most == pytest.approx(max(spans), abs=1e-6)
        assert found.per_token.p50 == pytest.approx(statistics.median_low(spans), abs=1e-6) or (
            found.per_token.p50 == pytest.approx(statistics.median_high(spans), abs=1e-6)
        )


def test_without_counts_there_are_times_and_no_rates() -> None:
    found = summarise_level(measured(exchange(0.0, 1.0, 1.5, prompt=None)))
    assert found.first_token is not None
    assert found.gaps is not None
    assert found.request_rate == pytest.approx(0.1)
    unknown = (found.output_rate, found.prompt_rate, found.per_token, found.found_share)
    assert unknown == (None, None, None, None)
    assert {figure.unit for figure in load_figures([found])} == {"ms"}


def test_one_answer_without_counts_takes_the_rates_of_all() -> None:
    # A sum over the others would be too small, and nobody would see it.
    found = summarise_level(measured(exchange(0.0, 1.0), exchange(0.0, 1.0, prompt=None)))
    assert found.output_rate is None


def test_nobody_was_answered() -> None:
    found = summarise_level(measured(exchange(0.0, prompt=None, error="stalled")))
    assert (found.answered, found.first_token, found.output_rate) == (0, None, None)
    assert load_figures([found]) == []


def test_gaps_beside_a_long_prompt_are_those_of_its_time() -> None:
    streams = [
        [t / 10 for t in range(1, 100)],  # a token each 100 ms
        [*(t / 10 for t in range(1, 41)), 6.0, *(6 + t / 10 for t in range(1, 40))],
    ]
    samples = [
        LevelExchange(n, 0, exchange(0.0, *events), "stream") for n, events in enumerate(streams)
    ]
    long = LevelExchange(2, 0, exchange(5.0, 7.0, 7.1, prompt=990, answer=2), "long")
    one = Measured(level("beside", 2), 0.0, 10.0, [*samples, long], alone=(1.0, 3.9))
    found = summarise_level(one)
    assert found.alone is not None
    assert found.beside is not None
    assert found.first_token is not None
    assert found.alone.most == pytest.approx(100)
    # From 4.0 to 6.0: it was under way when the prompt came.
    assert found.beside.most == pytest.approx(2000)
    assert found.first_token.p50 == pytest.approx(2000)
    assert found.prompt_rate == pytest.approx(495)
    assert any(gap == pytest.approx(2000) for _, gap in found.timeline)
    named = {figure.name: figure for figure in load_figures([found])}
    longest = named["time between tokens, longest"]
    assert longest.against[0].value == pytest.approx(100)
    assert longest.conditions_text == "streams 2, beside a prompt of 1,000 tokens"


def test_a_stream_that_says_nothing_any_more_counts_as_long_as_it_was_silent() -> None:
    silent = Exchange(0.0, 9.0, [1.0, 1.1, 1.2], is_stopped=True)
    going = exchange(0.0, *(t / 10 for t in range(1, 90)))
    samples = [LevelExchange(0, 0, silent, "stream"), LevelExchange(1, 0, going, "stream")]
    long = LevelExchange(2, 0, exchange(2.0, 7.0, prompt=990), "long")
    found = summarise_level(
        Measured(level("beside", 2), 0.0, 9.0, [*samples, long], alone=(0.5, 1.0))
    )
    assert found.beside is not None
    assert found.beside.most == pytest.approx(7800)


def result(users: int, rate: float | None, end: str = "") -> LevelResult:
    return LevelResult("fixed", f"{users}", users, 3, 3, 1.0, end, 10, 4, output_rate=rate)


@pytest.mark.parametrize(
    "rates, said",
    [
        ({1: 40.0}, ""),
        ({1: 40.0, 8: None}, ""),
        ({1: 40.0, 8: 100.0}, "best output is 100.0 tokens/s, with 8 users. More than 8 were not"),
        ({1: 40.0, 8: 95.0, 32: 100.0}, "with 32 users; 8 give 90% of it. More than 32"),
        ({1: 40.0, 8: 100.0, 32: 60.0}, "with 8 users, and 32 get 60% of it."),
        ({1: 40.0, 4: 20.0}, "with 1 user, and 4 get 50% of it."),
        ({1: 95.0, 4: 100.0}, "with 4 users; 1 gives 90% of it."),
    ],
)
def test_saturation_is_where_more_users_bring_no_more(
    rates: dict[int, float | None], said: str
) -> None:
    text = saturation([result(users, rate) for users, rate in rates.items()], "fixed")
    assert said in text
    assert bool(said) == bool(text)


def test_figures_of_a_run_differ_in_more_than_their_value() -> None:
    profiles: tuple[Profile, ...] = ("fixed", "agents")
    levels = [
        summarise_level(
            Measured(
                level(p, n), 0.0, 5.0, [LevelExchange(0, 0, exchange(0.0, 1.0, 2.0, cached=1))]
            )
        )
        for p, n in itertools.product(profiles, (1, 8))
    ]
    found = load_figures(levels)
    keys = {(one.name, one.unit, tuple(one.conditions.items())) for one in found}
    assert len(keys) == len(found) > 20


def test_few_values_have_no_99th_percentile_on_a_card() -> None:
    few = summarise_level(measured(*(exchange(0.0, 1.0, 1.1) for _ in range(3))))
    many = summarise_level(measured(*(exchange(0.0, 1.0, 1.1) for _ in range(20))))
    name = "time to the first token, 99th percentile"
    assert name not in {one.name for one in load_figures([few])}
    assert name in {one.name for one in load_figures([many])}


def test_an_interrupted_level_gives_no_figures() -> None:
    one = measured(exchange(0.0, 1.0, 2.0))
    one.end = "interrupted"
    assert summarise_level(one).first_token is not None
    assert load_figures([summarise_level(one)]) == []
