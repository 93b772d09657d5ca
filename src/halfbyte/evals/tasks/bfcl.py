"""Tool calls: the categories in Python of the Berkeley Function Calling Leaderboard.

Set: the data of the wheel bfcl-eval 2026.3.23 (BFCL v4, Apache-2.0), given by the user: 1,240 items
written by the authors, 2,251 that users contributed (live), 800 conversations of several turns with
simulated services. Not asked: Java and JavaScript, web search, memory, format sensitivity. Graded
by the leaderboard's rules (docs/reference/tool-calls.md), each item once; how the leaderboard
averages categories stands beside the mean over items, and its overall score is not made.
"""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from halfbyte import bfcl
from halfbyte.bfcl import Leaderboard
from halfbyte.errors import UsageError
from halfbyte.evals.grading import tool_calls, tool_services
from halfbyte.evals.tasks.benchmark import Benchmark, LoadedItems, Options, Steps, spread_indices
from halfbyte.evals.tasks.data import Provenance
from halfbyte.evals.tasks.published import Published, compared, published
from halfbyte.evals.types import Conversation, Prompt, Reply, Sample, Score

NAME = "bfcl"
# The leaderboard's own words. The first stands behind each function's description, the second is
# the user's turn that brings a function which was missing before.
LANGUAGE_HINT = " Note that the provided function is in Python 3 syntax."
MORE_FUNCTIONS = "I have updated some more functions you can choose from. What about now?"
# A turn may have so many steps with calls; the one that goes beyond is carried out and is the last.
MOST_STEPS = 20


def load(categories: Sequence[str], options: Options) -> LoadedItems:
    """Items of some categories, with what their grading needs."""
    leaderboard = bfcl.find_leaderboard(options.data)
    made = [sample for name in categories for sample in _samples(leaderboard, name)]
    kept = tuple(made[index] for index in spread_indices(len(made), options.limit))
    return LoadedItems(kept, _provenance(leaderboard, categories, made))


def _samples(leaderboard: Leaderboard, category: str) -> list[Sample]:
    rows = leaderboard.questions(category)
    answers: list[Any] = [None] * len(rows)
    if category not in bfcl.WITHOUT_ANSWER:
        # The two files have one order; a few answers have ids of their own.
        answers = [row["ground_truth"] for row in leaderboard.answers(category)]
    if len(answers) != len(rows):
        raise UsageError(
            f"{leaderboard.source}: {category} has {len(rows)} questions and {len(answers)} answers"
        )
    make = _conversation if category in bfcl.MULTI_TURN else _single
    return [
        make(leaderboard, category, row, answer) for row, answer in zip(rows, answers, strict=True)
    ]


def _single(leaderboard: Leaderboard, category: str, row: Mapping[str, Any], answer: Any) -> Sample:
    fields = {
        "category": category,
        "question": row["question"],
        "documents": row["function"],
        "answers": answer,
    }
    gold = (
        ("a call" if category == "live_relevance" else "no call")
        if answer is None
        else json.dumps(answer, ensure_ascii=False)
    )
    return Sample(row["id"], bfcl.related(row["id"], category), category, gold, fields)


def _conversation(
    leaderboard: Leaderboard, category: str, row: Mapping[str, Any], answer: Any
) -> Sample:
    classes = row["involved_classes"]
    if unknown := sorted(set(classes) - set(bfcl.SERVICES)):
        raise UsageError(f"{leaderboard.source}: {row['id']} needs unknown services {unknown}")
    documents = [one for name in classes for one in _documents(leaderboard, name)]
    missing = row.get("missed_function", {})
    later = {
        turn: [one for name in names for one in documents if one["name"] == name]
        for turn, names in missing.items()
    }
    held_back = {name for names in missing.values() for name in names}
    fields = {
        "category": category,
        "question": row["question"],
        "documents": [one for one in documents if one["name"] not in held_back],
        "later": later,
        "answers": answer,
        "services": tool_services.Services(
            tuple(classes),
            row["initial_config"],
            "long_context" in category,
            _sources(leaderboard, tuple(sorted(classes))),
        ),
    }
    group = bfcl.related(row["id"], category)
    return Sample(row["id"], group, category, json.dumps(answer, ensure_ascii=False), fields)


@functools.lru_cache(maxsize=64)
def _documents(leaderboard: Leaderboard, service: str) -> list[dict[str, Any]]:
    return leaderboard.documents(service)


@functools.lru_cache(maxsize=256)
def _sources(leaderboard: Leaderboard, classes: tuple[str, ...]) -> Mapping[str, str]:
    """Source texts of the services by module, what they share first."""
    stems = [bfcl.SHARED_SOURCE, *(bfcl.SERVICES[name] for name in classes)]
    return {stem: leaderboard.module(stem) for stem in stems}


def content(sample: Sample) -> str:
    """A hash by which an item is recognised: what it asks, offers and calls right."""
    f = sample.fields
    services = f.get("services")
    said = [
        f["category"],
        f["question"],
        f["documents"],
        f.get("later"),
        f["answers"],
        [services.classes, services.initial] if services else None,
    ]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]


def _provenance(
    leaderboard: Leaderboard, categories: Sequence[str], samples: Sequence[Sample]
) -> Provenance:
    """Which files these are; of any wheel it is said how far its items are the published ones."""
    hashes: dict[str, str] = {}
    for category in categories:
        names = [f"BFCL_v4_{category}.json"]
        if category not in bfcl.WITHOUT_ANSWER:
            names.append(f"possible_answer/{names[0]}")
        hashes |= {name: leaderboard.sha256(name) for name in names}
    services = [s.fields["services"] for s in samples if s.fields.get("services")]
    code = {f"{stem}.py": text for one in services for stem, text in one.sources.items()}
    hashes |= {name: hashlib.sha256(code[name].encode()).hexdigest() for name in sorted(code)}
    known = known_of(categories)
    found = Provenance(leaderboard.source, None, hashes, leaderboard.note)
    found = compared(found, known, [content(sample) for sample in samples])
    other = [name for name in sorted(code) if hashes[name] not in known.files]
    if other:
        said = f"simulated services other than published: {', '.join(other)}"
        found = replace(found, note="; ".join(filter(None, (found.note, said))))
    return found


def prompt(sample: Sample, earlier: Sequence[str], options: Options) -> Prompt:
    """What is asked first of an item: a conversation and its tools."""
    return next(converse(sample, options))


def converse(sample: Sample, options: Options) -> Steps:
    """The steps of an item: one, or those of a conversation with its services."""
    f = sample.fields
    tools = [bfcl.as_tool(_hinted(one)) for one in f["documents"]]
    if "services" not in f:
        reply = yield Conversation(tuple(f["question"][0]), tuple(tools))
        return tool_calls.write_answer([[reply]])
    messages: list[Mapping[str, Any]] = []
    turns: list[list[Reply]] = []
    for number, said in enumerate(f["question"]):
        if str(number) in f["later"]:
            tools += [bfcl.as_tool(one) for one in f["later"][str(number)]]
            said = [{"role": "user", "content": MORE_FUNCTIONS}]
        messages += said
        turns.append([])
        is_over = yield from _turn(f["services"], messages, tools, turns)
        if is_over:
            break
    return tool_calls.write_answer(turns)


def _turn(
    services: "tool_services.Services",
    messages: list[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    turns: list[list[Reply]],
) -> "tool_services.Turn":
    """Steps until the model calls nothing that can be read; whether the whole ends with it."""
    with_calls = 0
    while True:
        reply = yield Conversation(tuple(messages), tuple(tools))
        turns[-1].append(reply)
        messages.append(_said(reply))
        calls = tool_calls.read_calls(reply)
        if not calls:
            return False
        results = tool_services.carry_out(services, turns)
        if results is None:
            return True
        messages += [
            {"role": "tool", "tool_call_id": call.id, "content": result}
            for call, result in zip(reply.calls, results, strict=True)
        ]
        with_calls += 1
        if with_calls > MOST_STEPS:
            return True


def _said(reply: Reply) -> dict[str, Any]:
    """The model's message as later requests repeat it, without its thoughts."""
    message: dict[str, Any] = {"role": "assistant", "content": reply.text}
    if reply.calls:
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in reply.calls
        ]
    return message


def _hinted(document: Mapping[str, Any]) -> dict[str, Any]:
    return {**document, "description": document["description"] + LANGUAGE_HINT}


def grade(sample: Sample, text: str) -> Score:
    """By the calls, or by what a conversation's calls did to the services, in the sandbox."""
    f = sample.fields
    if "services" in f:
        return tool_services.grade_conversation(f["services"], f["answers"], text)
    return tool_calls.grade_calls(f["category"], f["documents"], f["answers"], text)


def leaderboard_averages(by_category: Mapping[str, tuple[int, float]]) -> dict[str, float]:
    """The averages that the leaderboard makes of categories: number of items and score of each.

    Non-live: mean of four categories (its "simple" averages three languages, of which one is asked
    here); live: over items; irrelevance and multi-turn: mean of the categories. Its overall score
    weighs these 10, 10, 10 and 30 of 100 and needs web search and memory for the rest.
    """
    groups = {
        "non_live": bfcl.NON_LIVE[:4],
        "live": bfcl.LIVE[:4],
        "irrelevance": ("irrelevance", "live_irrelevance"),
        "multi_turn": bfcl.MULTI_TURN,
    }
    found = {}
    for group, names in groups.items():
        if any(name not in by_category for name in names):
            continue
        weights = [by_category[name][0] if group == "live" else 1 for name in names]
        total = sum(w * by_category[name][1] for w, name in zip(weights, names, strict=True))
        found[group] = total / sum(weights)
    return found


def known_of(categories: Sequence[str]) -> Published:
    """What is known of the published items of all parts that are asked."""
    parts = [published(name) for name in PARTS if set(_PARTS[name][0]) <= set(categories)]
    return Published(
        sum(part.of for part in parts),
        frozenset[str]().union(*(part.items for part in parts)),
        sum(part.distinct for part in parts),
        sum(part.changing for part in parts),
        frozenset[str]().union(*(part.files for part in parts)),
    )


# Of each of them the published items are known; together they are the whole.
PARTS = ("bfcl_non_live", "bfcl_live", "bfcl_multi_turn")
# Name -> categories, title, items, mean tokens of prompts (of all steps) and of answers, groups.
_PARTS: Mapping[str, tuple[tuple[str, ...], str, int, int, int, int]] = {
    NAME: (bfcl.GRADED, "BFCL", 4_291, 10_000, 900, 2_276),
    "bfcl_non_live": (bfcl.NON_LIVE, "BFCL non-live", 1_240, 320, 400, 1_240),
    "bfcl_live": (bfcl.LIVE, "BFCL live", 2_251, 870, 400, 836),
    "bfcl_multi_turn": (bfcl.MULTI_TURN, "BFCL multi-turn", 800, 52_000, 3_000, 200),
}


def _benchmark(name: str) -> Benchmark:
    categories, title, items, prompt_tokens, output_tokens, groups = _PARTS[name]
    is_grouped = groups < items
    return Benchmark(
        name=name,
        title=title,
        kind="tools",
        load=functools.partial(load, categories),
        prompt=prompt,
        grade=grade,
        prompt_id="bfcl/native-tools/1",
        scorer="calls, or the state that they lead to, by the leaderboard's rules",
        source="bfcl-eval 2026.3.23",
        licence="Apache-2.0",
        full_items=items,
        repeats=1,
        margin=0.01 if name == NAME else 0.015,
        plan_variance=0.05,
        plan_prompt_tokens=prompt_tokens,
        plan_output_tokens=output_tokens,
        plan_groups=groups if is_grouped else None,
        plan_design=1.2 if is_grouped else 1.0,
        has_groups=is_grouped,
        concurrency=32,
        converse=converse,
    )


BENCHMARKS = tuple(_benchmark(name) for name in _PARTS)
