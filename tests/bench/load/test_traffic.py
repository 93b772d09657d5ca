"""The traffic of a run: the same for a seed, as agents send it, within the context, a file."""

import copy
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.bench.load.traffic import (
    FULL_CONTEXT,
    LEAST_CONTEXT,
    TrafficSizes,
    fitted,
    make_trace,
    read_trace,
    write_trace,
)
from halfbyte.errors import CapacityError, UsageError

SMALL = TrafficSizes(users=(1, 2), agents=(1, 2), requests=2, turns=3, streams=2)


@given(seed=st.integers(0, 2**32), context=st.none() | st.integers(LEAST_CONTEXT, 300_000))
@settings(max_examples=40)
def test_a_seed_gives_one_trace_and_its_file_gives_it_back(
    tmp_path_factory: pytest.TempPathFactory, seed: int, context: int | None
) -> None:
    trace = make_trace(seed, SMALL, context)
    assert trace == make_trace(seed, SMALL, context)
    assert make_trace(seed + 1, SMALL, context).digest != trace.digest
    path = tmp_path_factory.mktemp("trace") / "t.json"
    write_trace(trace, path)
    assert read_trace(path) == trace
    assert read_trace(path).digest == trace.digest


def test_a_trace_is_the_same_on_every_machine() -> None:
    # A change of this value is a change of what earlier traces and records measured.
    digest = make_trace(1, TrafficSizes(), None).digest
    assert digest.startswith("4b20a888b4ecd8cc")


@given(seed=st.integers(0, 2**32))
@settings(max_examples=25)
def test_agents_send_what_agents_send(seed: int) -> None:
    trace = make_trace(seed, TrafficSizes(profiles=("agents",)), FULL_CONTEXT * 2)
    assert not trace.cut
    assert [len(level.users) for level in trace.levels] == [1, 4, 16]
    for level in trace.levels:
        assert 50 <= level.prompt_per_answer <= 200
        sessions = list(level.sessions)
        assert len({(one.system_tokens, one.system_seed) for one in sessions}) == 1
        for session in sessions:
            first, *later = session.turns
            assert (first.role, first.wait_s) == ("user", 0.0)
            assert later
            assert all(turn.role == "tool" and 0.3 <= turn.wait_s <= 10 for turn in later)
            assert all(500 <= turn.tokens <= 8000 for turn in later)
            assert all(50 <= turn.answer_tokens <= 400 for turn in session.turns)
    seeds = [turn.seed for level in trace.levels for s in level.sessions for turn in s.turns]
    assert len(set(seeds)) == len(seeds)


@given(seed=st.integers(0, 2**32), context=st.integers(LEAST_CONTEXT, 200_000))
@settings(max_examples=60)
def test_every_session_fits_and_what_was_cut_is_said(seed: int, context: int) -> None:
    trace = make_trace(seed, SMALL, context)
    assert all(one.peak_tokens <= context for level in trace.levels for one in level.sessions)
    assert all(one.turns for level in trace.levels for one in level.sessions)
    assert fitted(trace, context) == trace
    is_smaller = {
        "fixed": trace.levels[0].answer_tokens < SMALL.answer_tokens * SMALL.requests,
        "beside": trace.levels[-1].beside.turns[0].tokens < SMALL.long_tokens,  # type: ignore[union-attr]
        "agents": context < FULL_CONTEXT * 0.9,
    }
    for profile, smaller in is_smaller.items():
        if smaller:
            assert any(words.startswith(f"{profile}:") for words in trace.cut)
    if context > FULL_CONTEXT * 1.2:
        assert trace.cut == ()


def test_a_context_too_small_for_anything_is_refused() -> None:
    with pytest.raises(CapacityError, match=r"the context is 128 tokens.*256 at least"):
        make_trace(1, TrafficSizes(), 128)


def test_a_trace_of_another_server_loses_turns_not_silently() -> None:
    trace = make_trace(1, TrafficSizes(agents=(2,), profiles=("agents",)), None)
    smaller = fitted(trace, 20_000)
    before, after = (t.levels[0].num_requests for t in (trace, smaller))
    assert after < before
    assert smaller.cut == (
        f"{before - after} turns have no room in a context of 20,000 tokens and are left out",
    )
    with pytest.raises(CapacityError, match=r"needs a context of 6,\d{3} tokens .* has 4,096"):
        fitted(trace, 4096)
    assert fitted(trace, None) == trace


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else []
    if isinstance(value, list):
        items = list(enumerate(value))[:2]
    for key, inner in items:
        found += _paths(inner, (*path, key))
    return found


PLAIN: dict[str, Any] = json.loads(
    json.dumps({"format": "halfbyte load trace 1", **asdict(make_trace(3, SMALL, 4096))})
)


JUNK: list[Any] = [None, True, -1, 0, 1.5, "x", [], {}, [[]], [None], 1e300, 10**30]


@given(
    path=st.sampled_from(_paths(PLAIN)),
    junk=st.sampled_from(JUNK),
)
@settings(max_examples=300)
def test_a_damaged_trace_is_refused_by_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, path: tuple[Any, ...], junk: Any
) -> None:
    damaged = copy.deepcopy(PLAIN)
    place: Any = damaged
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = junk
    file = tmp_path_factory.mktemp("trace") / "t.json"
    file.write_text(json.dumps(damaged))
    try:
        trace = read_trace(file)
    except UsageError as error:
        refused = str(error)
    else:
        refused = ""
    if refused:
        assert str(file) in refused
        return
    # What is read is a trace that can be sent.
    assert fitted(trace, None) == trace
    assert all(level.num_requests > 0 and level.title for level in trace.levels)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda t: t.pop("seed"), "the trace lacks seed"),
        (
            lambda t: t["levels"][0].update(profile="fast"),
            "levels[0].profile is 'fast'; it must be",
        ),
        (lambda t: t["levels"][0]["users"][0][0]["turns"].clear(), "turns is empty"),
        (lambda t: t["levels"][-1].update(beside=None), "levels[4].beside is None; the profile"),
        (lambda t: t.update(format="2"), "its format is '2'"),
    ],
)
def test_a_mistake_in_a_trace_is_named_by_its_place(tmp_path: Path, change: Any, said: str) -> None:
    damaged = copy.deepcopy(PLAIN)
    change(damaged)
    (tmp_path / "t.json").write_text(json.dumps(damaged))
    with pytest.raises(UsageError) as caught:
        read_trace(tmp_path / "t.json")
    assert said in str(caught.value)


def test_profiles_can_be_chosen() -> None:
    trace = make_trace(1, replace(SMALL, profiles=("beside",)), None)
    assert [level.title for level in trace.levels] == ["a long prompt beside 2 streams"]
