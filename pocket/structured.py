"""JSON by a schema: the data of a sentence, typed, with enums, arrays and one nested level."""

import json
from random import Random
from typing import Any

from pocket.items import Item, Split, ask, effort_of, say, split_of
from pocket.words import COLOURS, THINGS, made_up_name

_CITIES = ("Paris", "London", "Rome", "Madrid", "Berlin", "Lisbon", "Oslo", "Tokyo", "Vienna")
_SIZES = ("small", "medium", "large")

# field: (schema, words of the sentence with {v})
_FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "name": ({"type": "string"}, "the name is {v}"),
    "city": ({"type": "string"}, "it happens in {v}"),
    "age": ({"type": "integer"}, "the age is {v}"),
    "price": ({"type": "integer"}, "the price is {v}"),
    "count": ({"type": "integer"}, "there are {v} pieces"),
    "colour": ({"type": "string", "enum": list(COLOURS)}, "the colour is {v}"),
    "size": ({"type": "string", "enum": list(_SIZES)}, "the size is {v}"),
    "item": ({"type": "string"}, "it is about a {v}"),
    "paid": ({"type": "boolean"}, "{v}"),
    "friends": ({"type": "array", "items": {"type": "string"}}, "the friends are {v}"),
    "numbers": ({"type": "array", "items": {"type": "integer"}}, "the numbers are {v}"),
    "owner": ({"type": "object",
               "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
               "required": ["name", "age"]}, "it belongs to {v}"),
}  # fmt: skip


def _value(rng: Random, field: str) -> tuple[Any, str]:
    """(the value, its words)."""
    if field in ("age", "price", "count"):
        number = rng.randint(1, 99 if field == "age" else 999)
        return number, str(number)
    if field == "paid":
        paid = rng.random() < 0.5
        return paid, "it is paid" if paid else "it is not paid"
    if field == "friends":
        friends = [made_up_name(rng) for _ in range(rng.randint(1, 3))]
        return friends, " and ".join(friends)
    if field == "numbers":
        numbers = [rng.randint(0, 99) for _ in range(rng.randint(1, 4))]
        return numbers, " and ".join(map(str, numbers))
    if field == "owner":
        name, age = made_up_name(rng), rng.randint(1, 99)
        return {"name": name, "age": age}, f"{name}, aged {age}"
    if field == "name":
        name = made_up_name(rng)
        return name, name
    word = rng.choice({"city": _CITIES, "colour": COLOURS, "size": _SIZES, "item": THINGS}[field])
    return word, word


def structured(rng: Random, split: Split) -> Item:
    """The schema stands in the prompt, in the settings, or in both."""
    while True:
        fields = rng.sample(tuple(_FIELDS), rng.randint(1, 5))
        values = {field: _value(rng, field) for field in fields}
        if split_of(sorted((field, said) for field, (_, said) in values.items())) == split:
            break
    schema = {
        "type": "object",
        "properties": {field: _FIELDS[field][0] for field in fields},
        "required": fields,
        "additionalProperties": False,
    }
    told = [
        _FIELDS[field][1].format(v=values[field][1]) for field in rng.sample(fields, len(fields))
    ]
    text = ", ".join(told)
    text = text[0].upper() + text[1:] + "."
    where = rng.choice(("prompt", "settings", "both"))
    question = f"Give the data as JSON.\n\n{text}"
    if where != "settings":
        question = f"Give the data as JSON by this schema: {json.dumps(schema)}\n\n{text}"
    data = {field: value for field, (value, _) in values.items()}
    effort = effort_of(rng, 0.2)
    thought = f"The fields are {', '.join(fields)}." if effort == "high" else None
    shown = schema if where != "prompt" else None
    turns = (ask(question), say(json.dumps(data, ensure_ascii=False), thought))
    return Item("json", turns, effort, schema=shown, gold={"data": data})
