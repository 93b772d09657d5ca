"""Schemas, regexes, Lark grammars and tools by the thousand: ordinary ones, and hostile ones.

Each is a response_format or a list of tools as a client sends it. Ordinary ones come with a text
that fits, and have to be accepted; hostile ones have to be survived.
"""

import json
import random
import string
from collections.abc import Callable
from typing import Any, NamedTuple

from halfbyte.chat.schema import HeldSchema


class Made(NamedTuple):
    """One made-up request.

    kind    what it is: "schema", "tool", "regex", "choice" or "lark"
    source  a schema, a regex, choices or rules
    fits    a text that fits; None for hostile ones
    """

    name: str
    kind: str
    source: Any
    fits: str | None = None
    strict: bool = False

    def held(self) -> HeldSchema:
        path = "tools[0].function.parameters" if self.kind == "tool" else "schema"
        return HeldSchema(path, self.source, self.strict, is_object=self.kind == "tool")


def ordinary(rng: random.Random) -> Made:
    """What clients send on a good day, and what generators of schemas make of it."""
    kind = rng.choice(["schema", "schema", "tool", "tool", "regex", "choice", "lark"])
    if kind in ("schema", "tool"):
        schema, value = _object(rng, 3)
        if rng.random() < 0.5:
            schema = _careless(rng, schema)
        return Made("ordinary " + kind, kind, schema, json.dumps(value, ensure_ascii=False))
    if kind == "regex":
        pieces = [rng.choice(_PIECES) for _ in range(rng.randint(1, 5))]
        return Made(
            "ordinary regex", kind, "".join(p for p, _ in pieces), "".join(t for _, t in pieces)
        )
    if kind == "choice":
        choices = sorted({_text(rng) + _word(rng) for _ in range(rng.randint(1, 30))})
        return Made("ordinary choice", kind, choices, rng.choice(choices))
    word = _word(rng)
    rules = f'start: item ("," item)*\nitem: {json.dumps(word)} | NUMBER\nNUMBER: /[0-9]{{1,4}}/\n'
    return Made("ordinary lark", kind, rules, f"{word},12,{word}")


_PIECES = [
    (r"\d{2,4}", "123"), ("[a-f]+", "fade"), ("(yes|no)", "no"), (r"\w{1,8}", "Wort"),
    (r"-?\d+(\.\d+)?", "-1.5"), ("[^\\n]{0,40}", "a b"), ("(é|ü)", "ü"), (r"\s?x", " x"),
    ("(a|b)", "b"),
]  # fmt: skip


def _word(rng: random.Random) -> str:
    return "".join(rng.choice(string.ascii_lowercase) for _ in range(rng.randint(1, 8)))


def _text(rng: random.Random) -> str:
    return "".join(rng.choice('abc 123 é漢😀"\\/\x7f') for _ in range(rng.randint(0, 6)))


def _object(rng: random.Random, depth: int) -> tuple[dict[str, Any], dict[str, Any]]:
    properties, value = {}, {}
    for _ in range(rng.randint(1, 6)):
        name = _word(rng)
        properties[name], value[name] = _schema(rng, depth - 1)
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    schema["required"] = sorted(properties)
    if rng.random() < 0.5:
        schema["additionalProperties"] = False
    return schema, value


def _schema(rng: random.Random, depth: int) -> tuple[dict[str, Any], Any]:
    plain: list[tuple[dict[str, Any], Any]] = [
        ({"type": "string"}, _word(rng)),
        ({"type": "string", "maxLength": 12, "description": "x"}, _word(rng)),
        ({"type": "string", "pattern": "^[a-z]{1,8}$"}, _word(rng)),
        ({"type": "string", "format": "date"}, "2026-01-31"),
        ({"type": "integer", "minimum": -5, "maximum": 1000}, rng.randint(-5, 1000)),
        ({"type": "number"}, 1.5),
        ({"type": "boolean"}, True),
        ({"type": ["string", "null"]}, None),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, 3),
        ({"enum": ["a", 1, None]}, "a"),
        ({"const": "c"}, "c"),
        ({}, [1]),
    ]
    if depth <= 0 or rng.random() < 0.6:
        return rng.choice(plain)
    if rng.random() < 0.5:
        return _object(rng, depth)
    items, value = _schema(rng, depth - 1)
    return {"type": "array", "items": items, "maxItems": 5}, [value]


def _careless(rng: random.Random, schema: dict[str, Any]) -> dict[str, Any]:
    """The same with a clause that cannot be held, or that generators write for nothing."""
    schema = json.loads(json.dumps(schema))
    name = rng.choice(sorted(schema["properties"]))
    one = schema["properties"][name]
    change = rng.choice(
        ["look-ahead", "null", "wide", "case", "word", "reference", "enum", "bound", "title"]
    )
    if change == "look-ahead":
        one |= {"pattern": rng.choice([r"^(?!\.).+$", r"\bx\b", r"(a)\1", "(?=.*\\S)", "("])}
    elif change == "null":
        schema[rng.choice(["title", "$defs", "additionalProperties", "minProperties"])] = None
    elif change == "wide" and one.get("type") in ("integer", "number"):
        one |= {"minimum": -(2**63), "maximum": 2**63 - 1}
    elif change == "case" and isinstance(one.get("type"), str):
        one["type"] = one["type"].upper()
    elif change == "word":
        schema["properties"][name] = {"type": rng.choice(["any", "file", "datetime"])}
    elif change == "reference":
        schema["properties"][name] = {"$ref": "#/components/schemas/Pet"}
    elif change == "enum":
        one["enum"] = []
    elif change == "bound":
        one["maxLength"] = "many"
    else:
        schema["title"] = "T"
    return schema


# --- hostile --------------------------------------------------------------------------------

Maker = Callable[[random.Random], Made]


def _chain(rng: random.Random) -> Made:
    """References one after the other, of several shapes."""
    count = rng.choice([100, 600, 900, 2000, 2800])
    shape = rng.choice(["object", "bare", "array", "any", "all"])
    defs: dict[str, Any] = {f"a{count}": {"type": "string"}}
    for i in range(count):
        ref = {"$ref": f"#/$defs/a{i + 1}"}
        defs[f"a{i}"] = {
            "object": {"type": "object", "properties": {"x": ref}, "required": ["x"]},
            "bare": ref,
            "array": {"type": "array", "items": ref},
            "any": {"anyOf": [ref, {"type": "null"}]},
            "all": {"allOf": [ref, {"type": "string"}]},
        }[shape]
    kind = rng.choice(["schema", "tool"])
    schema = {"type": "object", "properties": {"x": {"$ref": "#/$defs/a0"}}, "$defs": defs}
    return Made(f"chain {shape} {count}", kind, schema, strict=rng.random() < 0.5)


def _rules(rng: random.Random) -> Made:
    count = rng.choice([100, 1500, 3000, 8000])
    name = rng.choice(["r", "R"])
    body = rng.choice(['"a" {0} | {0}', "{0}?", '{0} "x"', "({0})*"])
    lines = [f"{name}{i}: " + body.format(f"{name}{i + 1}") for i in range(count)]
    rules = "\n".join([f"start: {name}0", *lines, f'{name}{count}: "b"', ""])
    return Made(f"rules {name} {count}", "lark", rules)


def _regex_bomb(rng: random.Random) -> Made:
    inner = rng.choice(["a", "[ab]", "(a|b)", "(a?b)", ".", r"\w"])
    counts = [rng.choice([10, 100, 990, 1000]) for _ in range(rng.randint(1, 3))]
    source = inner
    for count in counts:
        low = rng.choice(["", "0,", "1,"])
        source = f"({source}){{{low}{count}}}"
    source = rng.choice(["", ".*", "(a|b)*"]) + source + rng.choice(["", "b", source])
    if rng.random() < 0.4:
        schema = {"type": "object", "properties": {"x": {"type": "string", "pattern": source}}}
        return Made("pattern bomb", rng.choice(["schema", "tool"]), schema)
    return Made("regex bomb", "regex", source)


def _counts(rng: random.Random) -> Made:
    many = rng.choice([10**3, 10**5, 10**7, 10**9, 2**31, 2**64])
    schema: dict[str, Any] = {"type": "string", rng.choice(["minLength", "maxLength"]): many}
    for _ in range(rng.randint(0, 3)):
        schema = {"type": "array", "items": schema, rng.choice(["minItems", "maxItems"]): many}
    return Made("counts", "schema", schema)


def _broken_regex(rng: random.Random) -> Made:
    text = "".join(rng.choice("(){}[]|*+?\\.^$a1,:=!<>-&~ ") for _ in range(rng.randint(1, 40)))
    return Made("broken regex", "regex", text)


def _broken_lark(rng: random.Random) -> Made:
    parts = [
        "start", ":", "|", '"a"', "/a*/", "(", ")", "*", "{3}", "%json", "{", "}", "\n", "x",
        "<[3]>", "%ignore", "&", "~", "%regex", "[", "]", "A", "->", "::", "%import", ",",
    ]  # fmt: skip
    text = "start: " + " ".join(rng.choice(parts) for _ in range(rng.randint(1, 30)))
    return Made("broken lark", "lark", text)


def _broken_schema(rng: random.Random) -> Made:
    """Keywords with values of any kind."""
    keywords = [
        "$ref", "$defs", "$id", "additionalProperties", "allOf", "anyOf", "const", "enum",
        "format", "items", "maxItems", "maxLength", "maximum", "minItems", "minLength", "minimum",
        "multipleOf", "not", "oneOf", "pattern", "patternProperties", "prefixItems", "properties",
        "required", "type",
    ]  # fmt: skip

    def value(depth: int) -> Any:
        choice = rng.randint(0, 11 if depth else 8)
        if choice == 9:
            return [value(depth - 1) for _ in range(rng.randint(0, 3))]
        if choice >= 10:
            return {
                rng.choice([*keywords, "a"]): value(depth - 1) for _ in range(rng.randint(0, 4))
            }
        return [None, True, False, -1, 3, 1e300, "string", "^(?!a)", "#/$defs/a"][choice]

    schema = {rng.choice(keywords): value(3) for _ in range(rng.randint(1, 5))}
    return Made("broken schema", rng.choice(["schema", "tool"]), schema, strict=rng.random() < 0.5)


def _wide(rng: random.Random) -> Made:
    count = rng.choice([500, 2000, 5000])
    names = [f"k{i}" for i in range(count)]
    schema: dict[str, Any] = rng.choice(
        [
            {"type": "object", "properties": {name: {"type": "integer"} for name in names}},
            {"enum": [name * 5 for name in names]},
            {"anyOf": [{"const": {name: 1}} for name in names[:1500]]},
            {"type": "object", "patternProperties": {f"^{n}.*": {} for n in names[:200]}},
        ]
    )
    return Made(f"wide {count}", "schema", schema)


def _laughs(rng: random.Random) -> Made:
    """Each definition uses the next one twice."""
    count = rng.choice([8, 20, 40])
    word = rng.choice(["allOf", "anyOf", "prefixItems"])
    defs: dict[str, Any] = {f"a{count}": {"type": "object"}}
    for i in range(count):
        defs[f"a{i}"] = {word: [{"$ref": f"#/$defs/a{i + 1}"}, {"$ref": f"#/$defs/a{i + 1}"}]}
    return Made(f"laughs {word} {count}", "schema", {"$ref": "#/$defs/a0", "$defs": defs})


def _sets(rng: random.Random) -> Made:
    """Terminals with intersections and complements, which grow exponentially."""
    parts = [f"/.*{c}.{{{rng.choice([2, 20, 200])}}}/" for c in rng.sample("abcdefgh", 3)]
    joined = rng.choice([" & ", " | ", " & ~"]).join(parts)
    return Made("sets", "lark", f"start: A\nA: {joined}\n")


def _ambiguous(rng: random.Random) -> Made:
    rules = rng.choice(
        [
            'start: a\na: a a | "x" | a a a\n',
            'start: "a"* "a"* "a"* "a"* "b"\n',
            'start: x{1000}\nx: y{1000}\ny: "ab"{1000}\n',
            'start: start "a" | start "b" | \n',
            f'start: {" ".join(["a?"] * 2000)}\na: "x"\n',
        ]
    )
    return Made("ambiguous", "lark", rules)


# The first ones cost little; the last ones up to the limit of a trial.
CHEAP: list[Maker] = [
    _broken_regex, _broken_lark, _broken_schema, _chain, _rules, _counts, _laughs, _ambiguous,
]  # fmt: skip
DEAR: list[Maker] = [_regex_bomb, _wide, _sets]


def hostile(rng: random.Random, *, dear: bool) -> Made:
    """What somebody sends who means ill, or has not thought."""
    return rng.choice(DEAR if dear else CHEAP)(rng)
