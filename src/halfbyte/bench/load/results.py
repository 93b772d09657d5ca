"""What the exchanges of a level come to: times of users, rates of the server, failures by kind.

Question: how long does a user wait for the first token and between tokens, and how many tokens a
    second does the server read and write, with 1 to 64 users, with agents, beside a long prompt?
Method: `run` sends a `traffic.Trace`; every piece of text is noted when it arrives (`client`).
    Prompts are new words each time, since the prefix cache would find old ones.
    Tokens are the server's own count (`usage`); without it there are no rates.
Cost model: none of its own; `bench engine` and `bench cpu` have the floors of a step.
Reading the result: a piece of text may be several tokens (speculation) or a token be none (half a
    character), so that a gap is between pieces; time per token is an answer's time over its tokens.
    Rates are the level's tokens over its whole time, first request to last answer, so that few
    requests of each user understate what a long run gives. Another program on the client's machine
    makes it late: `client late` says by how much.
Last record: none is published; see docs/api.md, "How fast is it?".
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from halfbyte.bench.load.run import LevelExchange, Measured, lateness
from halfbyte.bench.load.traffic import Level, Profile
from halfbyte.bench.record import percentile
from halfbyte.figures import Against, Figure

# The lowest level that gives this share of the best output rate is where a server is saturated.
_SATURATED = 0.9
_BINS = 80
# Of fewer values the 99th percentile is the largest, and no figure for a card.
_ENOUGH = 20


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, 99th percentile and most of some times, in milliseconds, and how many they were."""

    p50: float
    p99: float
    most: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread | None":
        """The spread of some values; None where there are none."""
        if not values:
            return None
        return cls(percentile(values, 0.5), percentile(values, 0.99), max(values), len(values))


@dataclass(frozen=True, slots=True)
class Failure:
    """Requests that failed in one way; `example` is what the first of them was told."""

    kind: str
    count: int
    example: str


@dataclass(frozen=True, slots=True)
class LevelResult:
    """One level. Rates are tokens a second; what the server does not count is None.

    prompt_tokens, answer_tokens  medians, as the server counted them
    asked_prompt, asked_answer    what the trace asked for, medians
    per_token                     an answer's time from its first token to its last, over its tokens
    found_share                   of prompt tokens, those that the server had in its prefix cache
    prompt_per_answer             prompt tokens of the level for each answer token
    alone, beside                 gaps of streams without and with the long prompt
    timeline                      seconds since the long prompt was sent, longest gap of any stream
    """

    profile: Profile
    title: str
    users: int
    planned: int
    answered: int
    wall_s: float
    end: str
    asked_prompt: float
    asked_answer: float
    prompt_tokens: float | None = None
    answer_tokens: float | None = None
    first_token: Spread | None = None
    gaps: Spread | None = None
    per_token: Spread | None = None
    output_rate: float | None = None
    prompt_rate: float | None = None
    request_rate: float | None = None
    found_share: float | None = None
    prompt_per_answer: float | None = None
    alone: Spread | None = None
    beside: Spread | None = None
    timeline: tuple[tuple[float, float], ...] = ()
    failures: tuple[Failure, ...] = ()
    skipped: Mapping[str, int] = field(default_factory=dict)
    late_ms: float = 0.0

    @property
    def failed(self) -> int:
        """Number of the level's requests that failed in any way."""
        return sum(failure.count for failure in self.failures)

    @property
    def is_sound(self) -> bool:
        """Whether its figures may stand on a card: nobody ended it, somebody was answered."""
        return self.end in ("", "time") and self.answered > 0

    @property
    def fields(self) -> dict[str, Any]:
        """The level's figures in the form that a record holds."""
        return asdict(self)


def summarise_level(measured: Measured) -> LevelResult:
    """Sum up the exchanges of one level in figures."""
    level, whole = measured.level, measured.whole
    if level.beside is not None:
        return _summarise_beside(measured)
    exchanges = [one.exchange for one in whole]
    wall = max(measured.ended - measured.started, 1e-9)
    prompts = [x.prompt_tokens for x in exchanges if x.prompt_tokens is not None]
    answers = [x.answer_tokens for x in exchanges if x.answer_tokens is not None]
    counts = bool(exchanges) and len(prompts) == len(answers) == len(exchanges)
    return LevelResult(
        **_about(measured),
        prompt_tokens=percentile(prompts, 0.5) if counts else None,
        answer_tokens=percentile(answers, 0.5) if counts else None,
        first_token=Spread.of(first_tokens_ms(whole)),
        gaps=Spread.of(gaps_ms(whole)),
        per_token=Spread.of(_per_token_ms(whole)),
        output_rate=sum(answers) / wall if counts else None,
        prompt_rate=sum(prompts) / wall if counts else None,
        request_rate=len(exchanges) / wall if exchanges else None,
        found_share=_found_share(whole),
        prompt_per_answer=sum(prompts) / max(sum(answers), 1) if counts else None,
    )


def _summarise_beside(measured: Measured) -> LevelResult:
    """Gaps of the streams alone, and from the long prompt's sending to its first token."""
    long = next((one.exchange for one in measured.samples if one.part == "long"), None)
    streams = [one for one in measured.samples if one.part == "stream"]
    alone = None
    if measured.alone is not None:
        alone = Spread.of([gap for _, gap in _gaps_within(streams, *measured.alone)])
    about = _about(measured)
    if long is None or not long.is_whole:
        return LevelResult(**about, alone=alone)
    first = long.events[0]
    during = _gaps_within(streams, long.started, first)
    return LevelResult(
        **about,
        prompt_tokens=long.prompt_tokens,
        answer_tokens=long.answer_tokens,
        first_token=Spread.of([(first - long.started) * 1000]),
        prompt_rate=None
        if long.prompt_tokens is None
        else long.prompt_tokens / max(first - long.started, 1e-9),
        alone=alone,
        beside=Spread.of([gap for _, gap in during]),
        timeline=_timeline(streams, long.started, first),
    )


def _about(measured: Measured) -> dict[str, Any]:
    """What every level has."""
    level = measured.level
    asked = list(level.sessions) if level.beside is None else [level.beside]
    return {
        "profile": level.profile,
        "title": level.title,
        "users": len(level.users),
        "planned": _planned(level),
        "answered": len(measured.whole),
        "wall_s": measured.ended - measured.started,
        "end": measured.end,
        "asked_prompt": percentile(_asked_prompts(asked), 0.5),
        "asked_answer": percentile([t.answer_tokens for s in asked for t in s.turns], 0.5),
        "failures": _failures(measured.samples),
        "skipped": dict(measured.skipped),
        "late_ms": lateness(measured.late_ms),
    }


def _planned(level: Level) -> int:
    """Streams are asked as often as it takes; the plan is the long prompt."""
    return level.num_requests if level.beside is None else len(level.beside.turns)


def _asked_prompts(sessions: Sequence[Any]) -> list[float]:
    found: list[float] = []
    for session in sessions:
        held = session.system_tokens
        for turn in session.turns:
            held += turn.tokens
            found.append(held)
            held += turn.answer_tokens
    return found


def first_tokens_ms(samples: Sequence[LevelExchange]) -> list[float]:
    """From sending to the first piece of text."""
    return [(one.exchange.events[0] - one.exchange.started) * 1000 for one in samples]


def gaps_ms(samples: Sequence[LevelExchange]) -> list[float]:
    """Between the pieces of text of an answer."""
    return [
        (later - earlier) * 1000
        for one in samples
        for earlier, later in itertools.pairwise(one.exchange.events)
    ]


def _per_token_ms(samples: Sequence[LevelExchange]) -> list[float]:
    return [
        (x.events[-1] - x.events[0]) * 1000 / (x.answer_tokens - 1)
        for x in (one.exchange for one in samples)
        if x.answer_tokens is not None and x.answer_tokens > 1
    ]


def _found_share(samples: Sequence[LevelExchange]) -> float | None:
    told = [
        (x.cached_tokens, x.prompt_tokens)
        for x in (one.exchange for one in samples)
        if x.cached_tokens is not None and x.prompt_tokens
    ]
    if not told:
        return None
    return sum(cached for cached, _ in told) / sum(prompt for _, prompt in told)


def _gaps_within(
    samples: Sequence[LevelExchange], begin: float, end: float
) -> list[tuple[float, float]]:
    """(when it ended, milliseconds) of the gaps that have a part between two moments.

    A stream that was stopped while it waited is in a gap too, of which so much is known.
    """
    found = []
    for one in samples:
        events = one.exchange.events
        for earlier, later in itertools.pairwise(events):
            if begin <= later and earlier <= end:
                found.append((later, (later - earlier) * 1000))
        is_waiting = one.exchange.is_stopped and events and events[-1] <= end
        if is_waiting and begin <= one.exchange.ended:
            found.append((one.exchange.ended, (one.exchange.ended - events[-1]) * 1000))
    return found


def _timeline(
    samples: Sequence[LevelExchange], begin: float, end: float
) -> tuple[tuple[float, float], ...]:
    """The longest gap in each of some equal stretches around the long prompt."""
    before = min(3.0, end - begin)
    start, stop = begin - before, end + before / 4
    width = (stop - start) / _BINS
    longest: dict[int, float] = {}
    for ended, gap in _gaps_within(samples, start, stop):
        place = min(max(int((ended - start) / width), 0), _BINS)
        longest[place] = max(longest.get(place, 0.0), gap)
    return tuple(
        (round(start + (place + 0.5) * width - begin, 4), round(gap, 3))
        for place, gap in sorted(longest.items())
    )


def _failures(samples: Sequence[LevelExchange]) -> tuple[Failure, ...]:
    found: dict[str, Failure] = {}
    for one in samples:
        kind = one.exchange.error
        if kind:
            known = found.get(kind, Failure(kind, 0, one.exchange.detail))
            found[kind] = Failure(kind, known.count + 1, known.example)
    return tuple(found.values())


def saturation(results: Sequence[LevelResult], profile: Profile) -> str:
    """A sentence on where more users bring no more; "" where levels or counts are too few."""
    rates = [
        (one.users, one.output_rate)
        for one in results
        if one.profile == profile and one.output_rate is not None and one.is_sound
    ]
    if len(rates) < 2:
        return ""
    best_users, best = max(rates, key=lambda pair: pair[1])
    enough = min(users for users, rate in rates if rate >= _SATURATED * best)
    name = ("agent" if profile == "agents" else "user") + "s" * (best_users != 1)
    text = f"The best output is {best:,.1f} tokens/s, with {best_users} {name}"
    if enough != best_users:
        text += f"; {enough} {'gives' if enough == 1 else 'give'} {_SATURATED:.0%} of it"
    most_users, last = max(rates)
    if most_users == best_users:
        return text + f". More than {most_users} were not tried, so there may be more to have."
    return text + f", and {most_users} get {last / best:.0%} of it."


def load_figures(results: Sequence[LevelResult]) -> list[Figure]:
    """What a card and README's table show, of the levels that nobody ended."""
    found: list[Figure] = []
    for one in results:
        if one.is_sound:
            found += _beside_figures(one) if one.profile == "beside" else _level_figures(one)
    return found


def _level_figures(one: LevelResult) -> list[Figure]:
    under = conditions(one)
    rows: list[Figure] = []
    for name, rate in (("output", one.output_rate), ("prompts taken in", one.prompt_rate)):
        if rate is not None:
            rows.append(Figure(name, rate, "tokens/s", "serving", under))
    for name, spread in (
        ("time to the first token", one.first_token),
        ("time between tokens", one.gaps),
    ):
        if spread is not None:
            rows.append(Figure(f"{name}, median", spread.p50, "ms", "serving", under))
            if spread.count >= _ENOUGH:
                rows.append(Figure(f"{name}, 99th percentile", spread.p99, "ms", "serving", under))
    if one.gaps is not None:
        rows.append(Figure("time between tokens, longest", one.gaps.most, "ms", "serving", under))
    if one.per_token is not None:
        rows.append(Figure("time per token, median", one.per_token.p50, "ms", "serving", under))
    if one.profile == "agents" and one.found_share is not None:
        rows.append(
            Figure("prompt found in the prefix cache", 100 * one.found_share, "%", "serving", under)
        )
    return rows


def _beside_figures(one: LevelResult) -> list[Figure]:
    under = conditions(one)
    rows = []
    if one.first_token is not None:
        name = "time to the first token of the long prompt"
        rows.append(Figure(name, one.first_token.p50, "ms", "serving", under))
    if one.beside is None:
        return rows
    for name, value, alone in (
        ("99th percentile", one.beside.p99, None if one.alone is None else one.alone.p99),
        ("longest", one.beside.most, None if one.alone is None else one.alone.most),
    ):
        against = () if alone is None else (Against("streams alone", alone),)
        rows.append(Figure(f"time between tokens, {name}", value, "ms", "serving", under, against))
    return rows


def conditions(one: LevelResult) -> dict[str, str | int | float]:
    """Under what a level was measured: sizes as the trace asked for them, the same in each run."""
    if one.profile == "beside":
        return {"streams": one.users, "beside a prompt of": f"{int(one.asked_prompt):,} tokens"}
    name = "agents" if one.profile == "agents" else "users"
    sizes: dict[str, str | int | float] = {
        "prompt tokens": int(one.asked_prompt), "answer tokens": int(one.asked_answer)
    }  # fmt: skip
    return {name: one.users, **sizes}
