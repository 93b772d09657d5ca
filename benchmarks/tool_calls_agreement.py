"""Whether our grading of tool calls decides as the leaderboard's own checker does.

Question: over right answers and answers made wrong in many ways, how often do the verdicts of
`evals.grading.tool_calls` and `tool_services` equal those of the checker in bfcl-eval?

Method: for each graded item answers are made from what its data states as right (values drawn from
the possible ones, optional ones left out), and from these by mutations: another value, type or
name, an argument or a call too few or too many, another order, another spelling of texts, changes
inside lists and objects, arguments that are no JSON object, text instead of calls; of conversations
also calls moved to another turn, turns left out, steps without calls. Fixed seeds. The checker runs
in an environment of its own (tool_calls_oracle.py); ours runs as `halfbyte grade` does,
conversations in the sandbox. A verdict is right or wrong; the checker's own crashes are counted
apart, as wrong. With --requests the first messages and all tools of every item are compared with
those that the leaderboard sends to Mistral, less what functions return.

Cost model: some 86,000 answers of one turn, a minute each side; 2,400 conversations, a quarter of a
second each (ours starts a sandbox).

Reading the result: every disagreement is in the record with its item, its kind and both reasons.
`right` says how many of the answers the checker called right: of a mutation that changes nothing
of importance many stay so.

Last records: benchmarks/records/tool_calls_agreement.json and tool_calls_requests.json beside it.

Run: PYTHONPATH=src python benchmarks/tool_calls_agreement.py FOLDER --oracle venv/bin/python
FOLDER holds the wheel; the oracle's environment is made with `pip install bfcl-eval soundfile`.
"""

import argparse
import ast
import copy
import hashlib
import json
import random
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple

from halfbyte import bfcl as leaderboard
from halfbyte.bench import record
from halfbyte.evals.grading.tool_calls import write_answer
from halfbyte.evals.tasks import bfcl
from halfbyte.evals.tasks.benchmark import Options
from halfbyte.evals.types import Conversation, Reply, Sample, ToolCall
from halfbyte.figures import Against, Figure

RECORD = Path(__file__).parent / "records" / "tool_calls_agreement.json"
REQUESTS = RECORD.with_name("tool_calls_requests.json")
ORACLE = Path(__file__).parent / "tool_calls_oracle.py"
# A call as it goes over the wire: name, and the text of its arguments.
Calls = list[tuple[str, dict[str, Any]]]
Wire = list[tuple[str, str]]


class Answer(NamedTuple):
    """One answer to an item: what kind of change made it, and its turns of steps."""

    sample: Sample
    place: int
    kind: str
    turns: list[list[Wire | str]]


# --- answers of one turn


def right_calls(sample: Sample, rng: random.Random, *, first: bool) -> Calls:
    """Right calls: the first possible value of everything, or drawn ones."""
    calls = []
    for answer in sample.fields["answers"]:
        ((name, parameters),) = answer.items()
        arguments = {}
        for key, options in parameters.items():
            given = [option for option in options if option != ""]
            if not given or (not first and "" in options and rng.random() < 0.5):
                continue
            chosen = given[0] if first else rng.choice(given)
            arguments[key] = _concrete(chosen, rng, first)
        calls.append((leaderboard.wire_name(name), arguments))
    return calls


def _concrete(option: Any, rng: random.Random, first: bool) -> Any:
    """A value: in objects each key has a list of possible ones."""
    if isinstance(option, dict):
        found = {}
        for key, values in option.items():
            given = [v for v in values if v != ""] if isinstance(values, list) else [values]
            if given and not (not first and "" in values and rng.random() < 0.5):
                found[key] = given[0] if first else rng.choice(given)
        return found
    if isinstance(option, list):
        return [_concrete(item, rng, first) if isinstance(item, dict) else item for item in option]
    return option


def other_value(value: Any, rng: random.Random) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + rng.choice([-1, 1, 10])
    if isinstance(value, float):
        return value + rng.choice([-0.5, 0.25, 1.0])
    if isinstance(value, str):
        return value + rng.choice(["x", " two", "1"]) if rng.random() < 0.7 else value[:-1]
    if isinstance(value, list):
        return value[:-1] if value and rng.random() < 0.5 else [*value, *value[:1]]
    if isinstance(value, dict):
        key = next(iter(value), "key")
        return {**value, key: other_value(value.get(key), rng)}
    return 0


def other_type(value: Any, rng: random.Random) -> Any:
    """The same value as another type, or a value of any type."""
    made: list[Any] = [None, str(value), [value], {"value": value}, True, 1, 0.5, "", [], {}]
    if isinstance(value, int | float):
        made += [float(value), int(value), bool(value)] * 2
    if isinstance(value, str):
        made += [value.split(), list(value)[:5]]
    if isinstance(value, list):
        made += [dict(enumerate(map(str, value))), tuple(value), *value[:1]]
    return rng.choice(made)


def respelled(value: Any, rng: random.Random) -> Any:
    """Texts in other letters and punctuation, here and in lists and objects."""
    if isinstance(value, str):
        changed = rng.choice([value.upper(), value.lower(), value.replace(" ", ""), value + "."])
        return rng.choice(
            [
                changed,
                changed.replace(" ", "-"),
                changed.replace('"', "'"),
                f"^{value}",
                changed.replace(",", " , "),
                value + "!",
                value.replace(" ", "\t"),
            ]
        )
    if isinstance(value, list):
        return [respelled(item, rng) for item in value]
    if isinstance(value, dict):
        return {key: respelled(item, rng) for key, item in value.items()}
    return value


def inside(value: Any, rng: random.Random) -> Any:
    """A change inside a list or an object; other values as `other_value`."""
    value = copy.deepcopy(value)
    if isinstance(value, list) and value:
        place = rng.randrange(len(value))
        change = rng.randrange(5)
        if change == 0:
            value[place] = inside(value[place], rng)
        elif change == 1:
            value[place] = other_type(value[place], rng)
        elif change == 2:
            value.reverse()
        elif change == 3:
            del value[place]
        else:
            value.insert(place, rng.choice([None, "", 1, *value]))
        return value
    if isinstance(value, dict) and value:
        key = rng.choice(list(value))
        change = rng.randrange(5)
        if change == 0:
            value[key] = inside(value[key], rng)
        elif change == 1:
            value[key] = other_type(value[key], rng)
        elif change == 2:
            value["unexpected"] = 1
        elif change == 3:
            del value[key]
        else:
            value[key] = [value[key]]
        return value
    return other_value(value, rng)


def _one(
    calls: Calls,
    rng: random.Random,
    change: Callable[[Any, random.Random], Any],
    of: type | UnionType = object,
) -> Calls:
    """Change one argument of one call; one of a type where there is one."""
    calls = copy.deepcopy(calls)
    places = [(n, key) for n, (_, given) in enumerate(calls) for key in given]
    if places:
        wanted = [(n, key) for n, key in places if isinstance(calls[n][1][key], of)]
        number, key = rng.choice(wanted or places)
        calls[number][1][key] = change(calls[number][1][key], rng)
    return calls


def _without_argument(calls: Calls, rng: random.Random) -> Calls:
    calls = copy.deepcopy(calls)
    number = rng.randrange(len(calls))
    if calls[number][1]:
        calls[number][1].pop(rng.choice(list(calls[number][1])))
    return calls


def _more_arguments(sample: Sample, calls: Calls, rng: random.Random) -> Calls:
    """An argument that is documented and need not be given, or one that is not."""
    calls = copy.deepcopy(calls)
    number = rng.randrange(len(calls))
    name, given = calls[number]
    documents = [d for d in sample.fields["documents"] if leaderboard.wire_name(d["name"]) == name]
    known = [p for d in documents for p in d["parameters"]["properties"] if p not in given]
    key = rng.choice([*known, "unexpected"])
    given[key] = rng.choice([0, "", "x", None, True, [], {}])
    return calls


def _wrong_function(sample: Sample, calls: Calls, rng: random.Random) -> Calls:
    calls = copy.deepcopy(calls)
    number = rng.randrange(len(calls))
    name, given = calls[number]
    others = [d["name"] for d in sample.fields["documents"]]
    written = [next(iter(answer)) for answer in sample.fields["answers"]]
    calls[number] = (
        rng.choice([*others, *written, name.upper(), name + "_", "", "no_such"]),
        given,
    )
    return calls


SINGLE: Mapping[str, Callable[[Sample, Calls, random.Random], Calls]] = {
    "value": lambda s, c, r: _one(c, r, other_value),
    "type": lambda s, c, r: _one(c, r, other_type),
    "spelling": lambda s, c, r: _one(c, r, respelled),
    "inside a list or object": lambda s, c, r: _one(c, r, inside, list | dict),
    "argument missing": lambda s, c, r: _without_argument(c, r),
    "argument too many": _more_arguments,
    "function": _wrong_function,
    "call missing": lambda s, c, r: [x for n, x in enumerate(c) if n != r.randrange(len(c))],
    "call too many": lambda s, c, r: [*c, copy.deepcopy(r.choice(c))],
    "order": lambda s, c, r: r.sample(c, len(c)),
    "call replaced by another": lambda s, c, r: [c[r.randrange(len(c))] for _ in c],
}


def _wire(calls: Calls) -> Wire:
    return [(name, json.dumps(arguments)) for name, arguments in calls]


def _broken(calls: Calls, rng: random.Random) -> Wire:
    wire = _wire(calls)
    number = rng.randrange(len(wire))
    name, text = wire[number]
    wire[number] = (
        name,
        rng.choice(
            [
                "",
                "{",
                text[:-1],
                "[]",
                '"text"',
                "null",
                "3",
                text + "}",
                json.dumps(text),
                "{'a': 1}",
                '{"a": NaN}',
            ]
        ),
    )
    return wire


def single_answers(sample: Sample, index: int, rng: random.Random, each: int) -> Iterator[Answer]:
    """Answers to an item of one turn, `each` of every kind."""
    documents = sample.fields["documents"]
    if sample.fields["answers"] is None:
        names = [leaderboard.wire_name(d["name"]) for d in documents] or ["no_such"]
        call = (rng.choice(names), {"a": 1})
        told: list[tuple[str, Wire | str]] = [
            ("text", "I cannot do that."), ("text", ""), ("no call", []), ("call", _wire([call])),
            ("calls", _wire([call, call])), ("arguments broken", _broken([call], rng)),
            ("arguments broken", _broken([call, call], rng)),
        ]  # fmt: skip
        for kind, said in told:
            yield Answer(sample, index, kind, [[said]])
        return
    yield Answer(sample, index, "right", [[_wire(right_calls(sample, rng, first=True))]])
    yield Answer(sample, index, "text", [[rng.choice(["I will.", "", "[f(a=1)]"])]])
    yield Answer(sample, index, "no call", [[[]]])
    for _ in range(each):
        calls = right_calls(sample, rng, first=False)
        yield Answer(sample, index, "right", [[_wire(calls)]])
        yield Answer(sample, index, "arguments broken", [[_broken(calls, rng)]])
        for kind, change in SINGLE.items():
            changed = change(sample, calls, rng)
            yield Answer(sample, index, kind, [[_wire(changed)]])
            if rng.random() < 0.2 and changed:
                other = rng.choice(list(SINGLE))
                again = SINGLE[other](sample, changed, rng)
                yield Answer(sample, index, "two changes", [[_wire(again)]])


# --- conversations


def right_turns(sample: Sample) -> list[Calls]:
    """The right calls of each turn, arguments by name."""
    later = sample.fields["later"].values()
    documents = [*sample.fields["documents"], *(d for found in later for d in found)]
    order = {d["name"]: list(d["parameters"]["properties"]) for d in documents}
    turns = []
    for texts in sample.fields["answers"]:
        calls: Calls = []
        for text in texts:
            call = ast.parse(text, mode="eval").body
            assert isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
            given = dict(zip(order[call.func.id], map(ast.literal_eval, call.args), strict=False))
            given |= {k.arg or "": ast.literal_eval(k.value) for k in call.keywords}
            calls.append((call.func.id, given))
        turns.append(calls)
    return turns


def _steps(turns: Sequence[Calls], rng: random.Random) -> list[list[Wire | str]]:
    """Each turn's calls in one step or several, and a last step of text."""
    made: list[list[Wire | str]] = []
    for calls in turns:
        steps: list[Wire | str] = []
        rest = list(calls)
        while rest:
            size = rng.choice([1, len(rest)])
            steps.append(_wire(rest[:size]))
            rest = rest[size:]
        made.append([*steps, "Done."])
    return made


def _pick(turns: Sequence[Calls], rng: random.Random) -> int:
    return rng.choice([n for n, calls in enumerate(turns) if calls])


def _in_turn(change: Callable[[Sample, Calls, random.Random], Calls]) -> Any:
    def changed(sample: Sample, turns: list[Calls], rng: random.Random) -> list[Calls]:
        number = _pick(turns, rng)
        turns[number] = change(sample, turns[number], rng)
        return turns

    return changed


def _move(sample: Sample, turns: list[Calls], rng: random.Random) -> list[Calls]:
    """A call made in another turn than its own."""
    one, other = _pick(turns, rng), rng.randrange(len(turns))
    call = turns[one].pop(rng.randrange(len(turns[one])))
    turns[other].insert(rng.randrange(len(turns[other]) + 1), call)
    return turns


def _explore(sample: Sample, turns: list[Calls], rng: random.Random) -> list[Calls]:
    """A further call of any function of the services, mostly without arguments."""
    name = rng.choice(sample.fields["documents"])["name"]
    turns[rng.randrange(len(turns))].append((name, rng.choice([{}, {}, {"folder": "x"}])))
    return turns


MULTI: Mapping[str, Callable[[Sample, list[Calls], random.Random], list[Calls]]] = {
    "right": lambda s, t, r: t,
    "value": _in_turn(SINGLE["value"]),
    "type": _in_turn(SINGLE["type"]),
    "spelling": _in_turn(SINGLE["spelling"]),
    "argument missing": _in_turn(SINGLE["argument missing"]),
    "argument too many": _in_turn(SINGLE["argument too many"]),
    "function": _in_turn(
        lambda s, c, r: [*c[:-1], (r.choice(["ls", "no_such", "exit", "a.b"]), {})]
    ),
    "call missing": _in_turn(SINGLE["call missing"]),
    "call too many": _in_turn(SINGLE["call too many"]),
    "order": _in_turn(SINGLE["order"]),
    "call in another turn": _move,
    "further call": _explore,
}  # fmt: skip


def conversations(sample: Sample, index: int, rng: random.Random, kinds: int) -> Iterator[Answer]:
    """A right answer, and some of the changes."""
    for kind in ["right", *rng.sample([*MULTI, "broken", "force", "empty turn"], kinds)]:
        turns = copy.deepcopy(right_turns(sample))
        steps = _steps(MULTI.get(kind, MULTI["right"])(sample, turns, rng), rng)
        if kind == "broken":
            number = _pick(turns, rng)
            steps[number].insert(rng.randrange(len(steps[number])), _broken(turns[number], rng))
        elif kind == "force":
            steps = steps[: rng.randrange(1, len(steps) + 1)]
        elif kind == "empty turn":
            said: list[Wire | str] = ["Which one?", "", []]
            steps[rng.randrange(len(steps))] = [rng.choice(said)]
        yield Answer(sample, index, kind, steps)


# --- both verdicts


def ours(answer: Answer) -> str | None:
    turns = [
        [
            Reply(said) if isinstance(said, str)
            else Reply("", tuple(ToolCall("", name, text) for name, text in said))
            for said in steps
        ]
        for steps in answer.turns
    ]  # fmt: skip
    score = bfcl.grade(answer.sample, write_answer(turns))
    return None if score.value == 1.0 else str(score.details.get("reason", score.cause))


def request_hash(sample: Sample) -> str:
    """A hash of what is asked first, and of the functions that come later."""
    asked = bfcl.prompt(sample, (), Options())
    assert isinstance(asked, Conversation)
    found = sample.fields.get("later", {})
    later = {turn: [leaderboard.as_tool(one) for one in more] for turn, more in found.items()}
    sent = [list(asked.messages), list(asked.tools), later]
    return hashlib.sha256(json.dumps(sent, sort_keys=True).encode()).hexdigest()


def verdicts(python: Path, answers: Sequence[Answer]) -> list[str | None]:
    """The checker's errors, one for each answer; None where it calls it right."""

    def said(step: Wire | str) -> Any:
        return step if isinstance(step, str) else [{name: text} for name, text in step]

    lines = []
    for answer in answers:
        turns = [[said(step) for step in steps] for steps in answer.turns]
        category = answer.sample.stratum
        is_single = not category.startswith("multi_turn")
        task = {"category": category, "index": answer.place}
        lines.append(json.dumps({**task, "said": turns[0][0] if is_single else turns}))
    return oracle(python, lines)


def oracle(python: Path, lines: Sequence[str]) -> list[str | None]:
    """What the oracle says of each line."""
    done = subprocess.run(
        [python, ORACLE], input="\n".join(lines), capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return [json.loads(line) for line in done.stdout.splitlines()]


class Tally(NamedTuple):
    """Both verdicts over some answers."""

    answers: int
    agree: int
    right: int
    crashes: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--oracle", type=Path, required=True)
    parser.add_argument("--each", type=int, default=2, help="answers of each kind and item")
    parser.add_argument("--conversations", type=int, default=2, help="changes of each conversation")
    parser.add_argument("--every", type=int, default=1, help="take every n-th item")
    parser.add_argument("--requests", action="store_true", help="compare what is sent, no verdicts")
    parser.add_argument("--out", type=Path, default=RECORD)
    parser.add_argument("--out-requests", type=Path, default=REQUESTS)
    args = parser.parse_args()
    rng = random.Random(0)
    answers: list[Answer] = []
    asked: list[tuple[Sample, str]] = []
    for category in leaderboard.GRADED:
        loaded = bfcl._samples(leaderboard.find_leaderboard(args.folder), category)
        for index, sample in enumerate(loaded[:: args.every]):
            place = index * args.every
            asked.append((sample, json.dumps({"category": category, "index": place})))
            if category in leaderboard.MULTI_TURN:
                answers += conversations(sample, place, rng, args.conversations)
            else:
                answers += single_answers(sample, place, rng, args.each)
    if args.requests:
        compare_requests(args, asked)
        return
    print(f"{len(answers)} answers", flush=True)
    with ThreadPoolExecutor(3) as pool:
        theirs_later = pool.submit(verdicts, args.oracle, answers)
        mine = list(pool.map(ours, answers))
        theirs = theirs_later.result()
    report(args, answers, mine, theirs)


def compare_requests(args: argparse.Namespace, asked: Sequence[tuple[Sample, str]]) -> None:
    """Record of how many items the first messages and all tools are those of the leaderboard."""
    sent = oracle(args.oracle, [line for _, line in asked])
    others = [
        sample.item_id
        for (sample, _), theirs in zip(asked, sent, strict=True)
        if request_hash(sample) != theirs
    ]
    tools = sum(len(sample.fields["documents"]) for sample, _ in asked)
    same = 100 - 100 * len(others) / len(asked)
    figure = Figure(
        "requests that equal the leaderboard's", same, "%", "evaluation",
        {"items": len(asked), "tools": tools}, (Against("at least", 100, is_bound=True),),
    )  # fmt: skip
    print(f"{figure.value:8.3f} %  {figure.name}: {figure.conditions_text}")
    record.write(
        args.out_requests,
        name="tool_calls_requests",
        question="Are tools and messages sent as the leaderboard sends them?",
        command="PYTHONPATH=src python benchmarks/tool_calls_agreement.py FOLDER --oracle PYTHON "
        "--requests",
        figures=[figure],
        results={"wheel": leaderboard.find_leaderboard(args.folder).source, "others": others},
    )


def report(
    args: argparse.Namespace,
    answers: Sequence[Answer],
    mine: Sequence[str | None],
    theirs: Sequence[str | None],
) -> None:
    """Print and record how far the verdicts agree, by kind of items and of change."""
    found: dict[tuple[str, str], list[tuple[bool, bool, bool]]] = defaultdict(list)
    apart = []
    for answer, one, other in zip(answers, mine, theirs, strict=True):
        part = "conversations" if "multi_turn" in answer.sample.stratum else "calls"
        if answer.sample.stratum in leaderboard.WITHOUT_ANSWER:
            part = "whether to call"
        agrees = (one is None) == (other is None)
        is_crash = other is not None and other.startswith("crash")
        found[part, answer.kind].append((agrees, other is None, is_crash))
        if not agrees:
            item = {"item": answer.sample.item_id, "kind": answer.kind, "turns": answer.turns}
            apart.append({**item, "ours": one, "theirs": other})
    tallies = {
        key: Tally(len(rows), *(sum(column) for column in zip(*rows, strict=True)))
        for key, rows in found.items()
    }
    figures = [
        Figure(
            "verdicts that equal the checker's", 100 * t.agree / t.answers, "%", "evaluation",
            {"of": part, "change": kind, "answers": t.answers, "right": t.right},
            (Against("at least", 100, is_bound=True),),
        )
        for (part, kind), t in sorted(tallies.items())
    ]  # fmt: skip
    total = Counter[str]()
    for (part, _), t in tallies.items():
        total[f"{part} agree"] += t.agree
        total[f"{part} answers"] += t.answers
        total[f"{part} right"] += t.right
        total[f"{part} crashes"] += t.crashes
    for part in ("calls", "whether to call", "conversations"):
        if not total[f"{part} answers"]:
            continue
        figures.insert(
            0,
            Figure(
                "verdicts that equal the checker's",
                100 * total[f"{part} agree"] / total[f"{part} answers"], "%", "evaluation",
                {"of": part, "answers": total[f"{part} answers"], "right": total[f"{part} right"],
                 "crashes of the checker": total[f"{part} crashes"]},
                (Against("at least", 100, is_bound=True),),
            ),
        )  # fmt: skip
    for figure in figures:
        print(f"{figure.value:8.3f} %  {figure.name}: {figure.conditions_text}")
    for row in apart[:20]:
        print(json.dumps(row)[:600])
    record.write(
        args.out,
        name="tool_calls_agreement",
        question="Does our grading of tool calls decide as the leaderboard's own checker does?",
        command="PYTHONPATH=src python benchmarks/tool_calls_agreement.py FOLDER --oracle PYTHON",
        figures=figures,
        results={
            "wheel": leaderboard.find_leaderboard(args.folder).source,
            "disagreements": apart[:200],
        },
    )


if __name__ == "__main__":
    main()
