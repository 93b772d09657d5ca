"""Tool calls: choose among several, none, two in parallel, use the result, invent nothing."""

import json
from collections.abc import Mapping
from random import Random
from typing import Any

from pocket.items import Call, Item, Split, Turn, ask, effort_of, say, split_of
from pocket.words import COLOURS, THINGS, made_up_name

_CITIES = (
    "Paris", "London", "Rome", "Madrid", "Berlin", "Lisbon", "Oslo", "Tokyo", "Seoul", "Cairo",
    "Dublin", "Vienna", "Prague", "Athens", "Delhi", "Lima", "Boston", "Geneva",
)  # fmt: skip
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_LANGUAGES = ("French", "German", "Spanish", "Dutch", "Italian", "Korean", "Japanese", "Arabic")
_UNITS = ("kilometres", "miles", "metres", "feet")
_ROOMS = ("kitchen", "office", "bedroom", "hall", "garage", "garden")
NO_TOOL = "I have no tool for that."

STRING, INTEGER = {"type": "string"}, {"type": "integer"}


def _enum(values: tuple[str, ...]) -> dict[str, Any]:
    return {"type": "string", "enum": list(values)}


def _slot(name: str, rng: Random) -> Any:
    """A value for a slot."""
    if name in ("count", "minutes", "amount", "level", "hour"):
        return rng.randint(
            *{
                "count": (1, 12),
                "minutes": (2, 90),
                "amount": (2, 999),
                "level": (1, 99),
                "hour": (1, 23),
            }[name]
        )
    if name in ("person", "guest"):
        return made_up_name(rng)
    values = {
        "city": _CITIES,
        "origin": _CITIES,
        "destination": _CITIES,
        "day": _DAYS,
        "language": _LANGUAGES,
        "unit": _UNITS,
        "room": _ROOMS,
        "colour": COLOURS,
        "item": THINGS,
        "text": THINGS,
    }
    return rng.choice(values[name])


# name: (description, parameters in order, requests, result fields, answer from the result)
_TOOLS: dict[str, tuple[str, dict[str, Any], tuple[str, ...], tuple[str, ...], str]] = {
    "get_weather": ("Tells the weather of a city.", {"city": STRING},
        ("What is the weather in {city}?", "Is it warm in {city} now?"),
        ("level",), "It is {level} degrees in {city}."),
    "get_time": ("Tells the local time of a city.", {"city": STRING},
        ("What time is it in {city}?", "Tell me the hour in {city}."),
        ("hour",), "It is {hour} o'clock in {city}."),
    "book_train": ("Books train seats between two cities.",
        {"origin": STRING, "destination": STRING, "count": INTEGER},
        ("Book {count} seats on the train from {origin} to {destination}.",
         "I need {count} train seats from {origin} to {destination}."),
        ("amount",), "Your {count} seats to {destination} cost {amount}."),
    "book_hotel": ("Books a hotel room in a city.",
        {"city": STRING, "day": _enum(_DAYS), "count": INTEGER},
        ("Book a hotel in {city} from {day} for {count} nights.",
         "I want to stay in {city} for {count} nights from {day}."),
        ("amount",), "Your hotel in {city} costs {amount}."),
    "send_message": ("Sends a message to a person.", {"person": STRING, "text": STRING},
        ("Write to {person} that I found the {text}.", "Send {person} a message: {text}."),
        ("level",), "Your message to {person} has number {level}."),
    "set_alarm": ("Sets an alarm on a day.", {"day": _enum(_DAYS), "hour": INTEGER},
        ("Wake me on {day} at {hour}.", "Set an alarm for {day}, {hour} o'clock."),
        ("level",), "Alarm {level} is set for {day}."),
    "start_timer": ("Starts a timer.", {"minutes": INTEGER},
        ("Start a timer of {minutes} minutes.", "Tell me when {minutes} minutes are over."),
        ("level",), "Timer {level} runs for {minutes} minutes."),
    "translate": ("Translates a text.", {"text": STRING, "language": _enum(_LANGUAGES)},
        ("Translate {text} into {language}.", "What is {text} in {language}?"),
        ("person",), "In {language} it is {person}."),
    "convert_length": ("Converts a length to another unit.",
        {"amount": INTEGER, "unit": _enum(_UNITS)},
        ("Convert {amount} yards to {unit}.", "How many {unit} are {amount} yards?"),
        ("level",), "That is {level} {unit}."),
    "set_light": ("Sets the light of a room.",
        {"room": _enum(_ROOMS), "colour": STRING, "level": INTEGER},
        ("Make the light in the {room} {colour} at {level} percent.",
         "Set the {room} light to {colour}, {level} percent."),
        ("hour",), "The light in the {room} stays on until {hour}."),
    "set_heating": ("Sets the temperature of a room.", {"room": _enum(_ROOMS), "level": INTEGER},
        ("Heat the {room} to {level} degrees.", "I want {level} degrees in the {room}."),
        ("minutes",), "The {room} will be warm in {minutes} minutes."),
    "find_item": ("Finds where a thing is kept.", {"item": STRING, "colour": STRING},
        ("Where is the {colour} {item}?", "Find my {colour} {item}."),
        ("room",), "The {colour} {item} is in the {room}."),
    "order_item": ("Orders things from the shop.", {"item": STRING, "count": INTEGER},
        ("Order {count} of the {item}.", "Buy {count} pieces: {item}."),
        ("amount",), "The order of {count} costs {amount}."),
    "get_price": ("Tells the price of a thing.", {"item": STRING},
        ("What does a {item} cost?", "Tell me the price of a {item}."),
        ("amount",), "The {item} costs {amount}."),
    "add_guest": ("Adds a guest to the list of a day.", {"guest": STRING, "day": _enum(_DAYS)},
        ("{guest} comes on {day}, put that on the list.", "Add {guest} to the guests of {day}."),
        ("count",), "There are {count} guests on {day}."),
    "call_person": ("Calls a person by telephone.", {"person": STRING},
        ("Call {person}.", "I want to talk to {person} on the phone."),
        ("minutes",), "{person} can talk in {minutes} minutes."),
}  # fmt: skip
_NO_TOOL_NEEDED = (
    ("Hello!", "Hello! How can I help you?"),
    ("Thank you.", "You are welcome."),
    ("Who are you?", "I am Pocket, a small model."),
    ("Good morning.", "Good morning! How can I help you?"),
)


def schema_of(name: str) -> dict[str, Any]:
    """The tool as a client sends it."""
    description, parameters = _TOOLS[name][:2]
    schema = {"type": "object", "properties": parameters, "required": list(parameters)}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": schema},
    }


def _asked(rng: Random, name: str) -> tuple[str, dict[str, Any]]:
    values = {slot: _slot(slot, rng) for slot in _TOOLS[name][1]}
    return rng.choice(_TOOLS[name][2]).format(**values), values


def _result(rng: Random, name: str, values: Mapping[str, Any]) -> tuple[str, str]:
    """(a tool's result, the answer from it)."""
    fields = {slot: _slot(slot, rng) for slot in _TOOLS[name][3] if slot not in values}
    return json.dumps(fields), _TOOLS[name][4].format(**{**values, **fields})


def _thought(calls: list[Call]) -> str:
    return " ".join(f"{call.name} fits." for call in calls) if calls else "No tool fits."


def _round(rng: Random, names: list[str]) -> tuple[str, list[Call], str, list[str]]:
    """(question, calls, answer, results of the calls)."""
    case = rng.choice(("one", "one", "one", "two", "unfit", "unneeded"))
    if case == "unneeded":
        question, answer = rng.choice(_NO_TOOL_NEEDED)
        return question, [], answer, []
    if case == "unfit":
        others = [name for name in _TOOLS if name not in names]
        return _asked(rng, rng.choice(others))[0], [], NO_TOOL, []
    questions, calls, results, answers = [], [], [], []
    for _ in range(2 if case == "two" else 1):
        name = rng.choice(names)
        question, values = _asked(rng, name)
        result, answer = _result(rng, name, values)
        questions.append(question)
        calls.append(Call(name, values))
        results.append(result)
        answers.append(answer)
    return " ".join(questions), calls, " ".join(answers), results


def tools(rng: Random, split: Split) -> Item:
    """Requests with one to six tools: a call, two calls, none that fits, or none needed.

    In training the calls are answered and more requests follow; a test ends with the first calls,
    or with the answer from their results.
    """
    names = rng.sample(tuple(_TOOLS), rng.randint(1, 6))
    effort = effort_of(rng, 0.3)
    turns: list[Turn] = []
    gold: dict[str, Any] = {}
    for _ in range(rng.randint(1, 4) if split == "train" else 1):
        while True:
            question, calls, answer, results = _round(rng, names)
            different = len({repr(call) for call in calls}) == len(calls)
            if different and split_of((sorted(names), question)) == split:
                break
        thought = _thought(calls) if effort == "high" else None
        turns.append(ask(question))
        if calls:
            turns.append(Turn("assistant", thought=thought, calls=tuple(calls)))
            gold = {"calls": [[call.name, dict(call.arguments)] for call in calls]}
            if split == "test" and rng.random() < 0.75:
                break
            turns += [Turn("tool", result) for result in results]
            thought = "The result is there." if thought else None
        turns.append(say(answer, thought))
        gold = {"text": answer}
    listed = tuple(schema_of(name) for name in names)
    return Item("tools", tuple(turns), effort, tools=listed, gold=gold)
