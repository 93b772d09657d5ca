"""Whether tool calls are the right ones, by the rules of the Berkeley Function Calling Leaderboard.

An answer is what a model said in each step of each turn: text, and calls whose arguments are the
text that came. Rules, in our own words: docs/reference/tool-calls.md. That they decide as the
leaderboard's own checker does is shown by benchmarks/tool_calls_agreement.py.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from halfbyte.bfcl import WITHOUT_ANSWER, wire_name
from halfbyte.evals.types import Reply, Score, ToolCall, right_or_wrong, unparsed

# What a document calls a type -> what a value that was read from JSON has.
_TYPES: Mapping[str, type] = {
    "string": str,
    "any": str,
    "integer": int,
    "float": float,
    "boolean": bool,
    "array": list,
    "tuple": list,
    "dict": dict,
}
_LISTS = ("array", "tuple")
# Removed before texts are compared: "April 1, 2024" and "april 1 2024" are one.
_IGNORED = str.maketrans("'", '"', " ,./-_*^")
# What a rule raises of a value it was not made for, such as a whole number beyond a float.
_BEYOND_RULES = (TypeError, KeyError, IndexError, AttributeError, OverflowError)

Turns = Sequence[Sequence[Reply]]


class Call(NamedTuple):
    """A call of an answer, its arguments read from their JSON text."""

    name: str
    arguments: Mapping[str, Any]


def write_answer(turns: Turns) -> str:
    """The answer of an attempt as it is stored: JSON, arguments as the text that came."""
    return json.dumps(
        {
            "turns": [
                [{"text": r.text, "calls": [[c.name, c.arguments] for c in r.calls]} for r in steps]
                for steps in turns
            ]
        },
        ensure_ascii=False,
    )


def read_answer(answer: str) -> list[list[Reply]]:
    """What `write_answer` wrote; raises ValueError for anything else."""
    try:
        return [
            [
                Reply(
                    str(step["text"]),
                    tuple(
                        ToolCall(f"call-{number}", str(name), str(arguments))
                        for number, (name, arguments) in enumerate(step["calls"])
                    ),
                )
                for step in steps
            ]
            for steps in json.loads(answer)["turns"]
        ]
    except (KeyError, TypeError, AttributeError) as failure:
        raise ValueError(f"no answer of tool calls: {answer[:100]!r}") from failure


def read_calls(reply: Reply) -> list[Call] | None:
    """The calls of a step; None if the arguments of any are not a JSON object."""
    found = []
    for call in reply.calls:
        try:
            arguments = json.loads(call.arguments)
        except (ValueError, RecursionError):
            return None
        if not isinstance(arguments, dict):
            return None
        found.append(Call(call.name, arguments))
    return found


def grade_calls(
    category: str,
    documents: Sequence[Mapping[str, Any]],
    answers: Sequence[Mapping[str, Any]],
    answer: str,
) -> Score:
    """Score an answer of one turn and one step.

    documents  of the functions that were offered
    answers    the right calls: name -> parameter -> values that are right ("": may be absent)
    """
    reply = read_answer(answer)[0][0]
    calls = read_calls(reply)
    shown = json.dumps([[c.name, c.arguments] for c in reply.calls], ensure_ascii=False)
    if category in WITHOUT_ANSWER:
        # Calls that cannot be read are none.
        return right_or_wrong(bool(calls) is (category == "live_relevance"), shown)
    if calls is None:
        return unparsed(reason="the arguments of a call are not a JSON object")
    fault = fault_of(category, documents, answers, calls)
    return right_or_wrong(fault is None, shown, **({"reason": fault} if fault else {}))


def fault_of(
    category: str,
    documents: Sequence[Mapping[str, Any]],
    answers: Sequence[Mapping[str, Any]],
    calls: Sequence[Call],
) -> str | None:
    """What is wrong with calls; None if they are right. Calls in parallel may have any order."""
    if len(calls) != len(answers):
        return f"{len(calls)} calls, not {len(answers)}"
    if "parallel" not in category:
        # With one function its document is the one; among several it is that of the right answer.
        is_multiple = "multiple" in category
        document = _document(documents, answers[0]) if is_multiple else documents[0]
        return _fault_of_call(document, answers[0], calls[0])
    waiting = list(range(len(calls)))
    for answer in answers:
        # The first call that fits is taken, and not given back.
        document = _document(documents, answer)
        fitting = (n for n in waiting if _fault_of_call(document, answer, calls[n]) is None)
        taken = next(fitting, None)
        if taken is None:
            return f"no call is {json.dumps(answer, ensure_ascii=False)[:300]}"
        waiting.remove(taken)
    return None


def _document(
    documents: Sequence[Mapping[str, Any]], answer: Mapping[str, Any]
) -> Mapping[str, Any]:
    name = next(iter(answer))
    return next(one for one in documents if one["name"] == name)


def _fault_of_call(
    document: Mapping[str, Any], answer: Mapping[str, Any], call: Call
) -> str | None:
    try:
        return _fault(document["parameters"], document["name"], next(iter(answer.values())), call)
    except _BEYOND_RULES as failure:
        return f"the rules have no place for this value: {failure}"


def _fault(
    parameters: Mapping[str, Any], name: str, right: Mapping[str, Any], call: Call
) -> str | None:
    if call.name != wire_name(name):
        return f"{call.name} is called, not {wire_name(name)}"
    for required in parameters["required"]:
        if required not in call.arguments:
            return f"{required} is missing"
    for key, value in call.arguments.items():
        if key not in parameters["properties"] or key not in right:
            return f"{key} is not expected"
        if fault := _fault_of_value(parameters["properties"][key], right[key], value):
            return f"{key}: {fault}"
    for key, options in right.items():
        if key not in call.arguments and "" not in options:
            return f"{key} is missing"
    return None


def _fault_of_value(details: Mapping[str, Any], options: list[Any], given: Any) -> str | None:
    """What is wrong with an argument's value.

    Where the possible values have another type than the document states, they are names that stand
    for values: such a value must be equal to one of them, to the letter.
    """
    stated, wanted = details["type"], _TYPES[details["type"]]
    value: Any = float(given) if stated == "float" and type(given) is int else given
    inner = _TYPES[details["items"]["type"]] if stated in _LISTS else None
    named = _type_of(options)
    given_type: type = type(value)
    if given_type is wanted:
        if inner is not None and not _items_have_type(options, inner, value):
            return f"the items of {json.dumps(value)[:200]} are not of the type {inner.__name__}"
        is_name = named is not None and named is not wanted
    elif given_type is named:
        is_name = True
    else:
        return f"{json.dumps(value)[:200]} is not of the type {stated}"
    fits = _equals if is_name else _rule(wanted, inner)
    return None if fits(options, value) else f"{json.dumps(value)[:200]} is not right"


def _type_of(options: Sequence[Any]) -> type | None:
    """The type of the first possible value; "" says that there need be none."""
    return next((type(option) for option in options if option != ""), None)


def _items_have_type(options: Sequence[Any], inner: type, value: Sequence[Any]) -> bool:
    """Whether the items of a list have the stated type, or that of the items of a possible list.

    A possible value that is no list asks nothing of the items.
    """
    return any(
        type(option) is not list
        or all(type(item) is inner or type(item) is _type_of(option) for item in value)
        for option in options
    )


def _rule(wanted: type, inner: type | None) -> Callable[[list[Any], Any], bool]:
    if wanted is dict:
        return _is_object
    if wanted is list:
        return _is_list_of_objects if inner is dict else _is_list
    return _is_text if wanted is str else _equals


def _equals(options: list[Any], value: Any) -> bool:
    return value in options


def _plain(value: Any) -> Any:
    """A text without blanks and the punctuation that is ignored, in small letters."""
    return value.translate(_IGNORED).lower() if type(value) is str else value


def _plain_items(items: Sequence[Any]) -> list[Any]:
    return [_plain(items[place]) for place in range(len(items))]


def _is_text(options: list[Any], value: str) -> bool:
    return _plain(value) in [_plain(option) for option in options if type(option) is str]


def _is_list(options: list[Any], value: list[Any]) -> bool:
    """In order, texts compared as texts; "" among the possible values is the empty list."""
    return _plain_items(value) in [_plain_items(option) for option in options]


def _is_object(options: list[Any], value: Mapping[str, Any]) -> bool:
    return any(option != "" and _has_entries(option, value) for option in options)


def _has_entries(option: Mapping[str, Any], value: Mapping[str, Any]) -> bool:
    """Whether each entry is right and none is missing; in an option each key has its own values."""
    for key, entry in value.items():
        if key not in option or _plain(entry) not in _plain_items(option[key]):
            return False
    return all(key in value or "" in allowed for key, allowed in option.items())


def _is_list_of_objects(options: list[Any], value: list[Any]) -> bool:
    """Object by object in order, of equal number."""
    return any(
        len(value) == len(option)
        and all(_is_object([one], entry) for one, entry in zip(option, value, strict=True))
        for option in options
    )
