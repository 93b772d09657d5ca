"""What of a schema is held, and how what is not held is named."""

import json
from typing import Any

import llguidance
import pytest

from halfbyte.chat.grammar_limits import GrammarLimits, build, fault
from halfbyte.chat.schema import (
    HeldSchema,
    MendedSchema,
    guided,
    mended,
    object_schema,
    short_list,
    tidied,
    wide_bounds,
)
from halfbyte.errors import RequestError


def tidy(schema: dict[str, Any], *, is_object: bool = False) -> MendedSchema:
    return tidied(HeldSchema("s", schema, strict=False, is_object=is_object))


@pytest.mark.parametrize("key", ["required", "properties", "type", "items", "enum", "anyOf", "$ref",
                                 "pattern", "minimum", "maxLength", "additionalProperties", "$defs",
                                 "title", "minItems", "format", "patternProperties"])  # fmt: skip
def test_null_is_read_as_absent(key: str) -> None:
    assert tidy({"description": "x", key: None}) == MendedSchema({"description": "x"})


def test_null_is_a_value_where_it_can_be_one() -> None:
    schema = {"const": None, "default": None, "enum": [None, 1]}
    assert tidy(schema) == MendedSchema(schema)
    assert tidy({"properties": {"a": None}}).schema == {"properties": {"a": {}}}


@pytest.mark.parametrize(
    ("kind", "expected", "num_notes"),
    [
        ("STRING", "string", 0),
        (["String", "NULL"], ["string", "null"], 0),
        (["string", None], ["string", "null"], 0),
        ("any", None, 1),
        ("file", None, 1),
        (["string", "file"], None, 1),
        ([], None, 1),
        ({"a": 1}, None, 1),
        (5, None, 1),
    ],
)
def test_words_that_are_no_types(kind: Any, expected: Any, num_notes: int) -> None:
    found = tidy({"type": kind})
    assert found.schema.get("type") == expected and len(found.notes) == num_notes


@pytest.mark.parametrize("key", ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"])
@pytest.mark.parametrize(
    "bound", [2**63 - 1, -(2**63), 2**64, -(10**400), 1.7976931348623157e308, -1e20, "5", [1]]
)
def test_bounds_of_the_machine_go_and_are_named(key: str, bound: Any) -> None:
    found = tidy({"type": "integer", key: bound})
    assert found.schema == {"type": "integer"} and f"s.{key}" in found.notes[0]
    assert tidy({"type": "integer", key: 2**62}).schema == {"type": "integer", key: 2**62}


@pytest.mark.parametrize(
    ("count", "expected"), [(3, 3), (3.0, 3), (-1, None), (1.5, None), ("3", None), (2**63, None)]
)
def test_counts(count: Any, expected: int | None) -> None:
    found = tidy({"maxLength": count})
    assert found.schema.get("maxLength") == expected and bool(found.notes) is (expected is None)


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#/nowhere"},
        {"$ref": "#/$defs/b/properties", "$defs": {"a": {}}},
        {"$ref": "https://example.org/x.json"},
        {"$ref": "other.json#/a"},
        {"$ref": "#name"},
        {"$ref": 5},
    ],
)
def test_references_that_lead_nowhere(schema: dict[str, Any]) -> None:
    found = tidy({"properties": {"x": schema}, "title": "t"})
    assert "$ref" not in found.schema["properties"]["x"]
    assert "s.properties.x.$ref" in found.notes[0]


def test_references_that_lead_somewhere_stay() -> None:
    schema = {
        "$defs": {"a/b": {"type": "string"}, "c": {"$anchor": "c"}, "%": {}},
        "properties": {
            "x": {"$ref": "#/$defs/a~1b"},
            "y": {"$ref": "#/properties/x"},
            "z": {"$ref": "#"},
            "w": {"$ref": "#c"},
            "v": {"$ref": "#/$defs/%25"},
            "u": {"anyOf": [{"$ref": "#/$defs/c"}]},
        },
    }
    assert tidy(schema) == MendedSchema(schema)


def test_definitions_beside_the_reference_are_found() -> None:
    inner = {"$ref": "#/$defs/A", "$defs": {"A": {"type": "string"}}}
    found = tidy({"properties": {"a/b": inner}})
    assert found.notes == ()
    assert found.schema["properties"]["a/b"]["$ref"] == "#/properties/a~1b/$defs/A"


@pytest.mark.parametrize(
    ("kind", "values", "goes"),
    [
        ("integer", ["1", "2"], True),
        ("string", [1, None], True),
        (["string", "null"], [1], True),
        ("integer", [1.0], False),
        ("number", [True], True),
        ("string", [1, "a"], False),
        ("object", [{}], False),
        (None, [1], False),
        ("string", [], True),
        ("string", "a", True),
    ],
)
def test_values_that_contradict_the_type(kind: Any, values: Any, goes: bool) -> None:
    found = tidy({**({"type": kind} if kind else {}), "enum": values})
    assert ("enum" not in found.schema) is goes and bool(found.notes) is goes


def test_const_that_contradicts_the_type() -> None:
    assert tidy({"type": "string", "const": 1}).schema == {"type": "string"}
    assert tidy({"type": "integer", "const": 1}).notes == ()


@pytest.mark.parametrize("value", ["string", 5, [1], [{}], {"a": 1}])
@pytest.mark.parametrize("key", ["properties", "items", "anyOf", "required", "additionalProperties",
                                 "not", "$defs", "pattern", "enum", "type", "$ref"])  # fmt: skip
def test_whatever_a_keyword_has_does_no_harm(key: str, value: Any) -> None:
    found = tidy({"type": "object", key: value})
    json.dumps(found.schema)
    # What has been tidied once is tidy.
    assert tidied(HeldSchema("s", found.schema, strict=False)).schema == found.schema


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (None, "object"),
        ({}, "object"),
        ({"properties": {}}, "object"),
        ({"type": "object"}, "object"),
        ({"type": ["object", "null"]}, "object"),
        ({"type": ["null", "object", "array"]}, "object"),
        ({"type": None}, "object"),
        ({"type": "array", "items": {}}, None),
        ({"type": ["string", "null"]}, None),
        ({"type": "null"}, None),
        ({"type": 5}, None),
    ],
)
def test_arguments_are_objects(schema: Any, expected: str | None) -> None:
    if expected is None:
        with pytest.raises(RequestError, match=r"tools\[3\].function.parameters"):
            object_schema(schema, "tools[3].function.parameters")
    else:
        assert object_schema(schema, "p")["type"] == expected


def test_bounds_beyond_doubles_are_named() -> None:
    def notes(bound: Any) -> list[str]:
        schema = {"properties": {"n": {"type": "integer", "maximum": bound}}}
        return list(wide_bounds(HeldSchema("s", schema, strict=True)))

    assert notes(2**53) == notes(1.5) == notes(True) == notes(2**63) == []
    (note,) = notes(2**53 + 1)
    assert note.startswith("s.properties.n.maximum: 9007199254740993")


def test_short_list() -> None:
    assert short_list(["a"] * 3) == ("a",) * 3
    assert short_list(["a"] * 20)[-1] == "and 12 more" and len(short_list(["a"] * 20)) == 9


# --- what has to be tried; these grammars are harmless, so this process may try them ----------


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return llguidance.LLTokenizer("byte")


def mend(
    tokenizer: Any, schema: dict[str, Any], *, strict: bool = False, is_object: bool = False
) -> MendedSchema:
    def fails(lark: str) -> str | None:
        return fault(build(tokenizer, lark, GrammarLimits(), is_free=False))

    found = mended(HeldSchema("s", schema, strict, is_object), fails)
    if found.fault is None:
        assert fails(f"start: %json {guided(found.schema, lenient=not strict)}\n") is None
    return found


@pytest.mark.parametrize(
    "pattern",
    [r"^(?!\.).+$", r"\bred\b", "(?=.*\\S).+", "(a)\\1", "(", "(?<!a)b", "[z-a]", "a{2,1}"],
)
def test_a_pattern_goes_and_the_rest_stays(tokenizer: Any, pattern: str) -> None:
    schema = {
        "type": "object",
        "properties": {
            "a": {"type": "string", "pattern": pattern, "maxLength": 3},
            "b": {"type": "array", "items": {"anyOf": [{"type": "string", "pattern": pattern}]}},
            "c": {"type": "string", "pattern": "^x$"},
        },
        "required": ["a", "c"],
        "additionalProperties": False,
    }
    found = mend(tokenizer, schema)
    properties = found.schema["properties"]
    assert properties["a"] == {"type": "string", "maxLength": 3}
    assert properties["b"]["items"] == {"anyOf": [{"type": "string"}]}
    assert properties["c"] == schema["properties"]["c"]  # type: ignore[index]
    assert found.schema["required"] == ["a", "c"] and len(found.notes) == 2
    assert found.notes[0].startswith("s.properties.a.pattern: ")
    assert found.notes[1].startswith("s.properties.b.items.anyOf[0].pattern: ")


def test_what_can_be_held_is_left_alone(tokenizer: Any) -> None:
    schema = {"type": "object", "properties": {"a": {"$ref": "#"}}}
    assert mend(tokenizer, schema) == MendedSchema(schema)


def test_names_of_a_pattern_that_cannot_be_held_are_not_forbidden(tokenizer: Any) -> None:
    schema = {"type": "object", "patternProperties": {"(?=x)": {}}, "additionalProperties": False}
    found = mend(tokenizer, schema)
    assert found.schema == {"type": "object"} and len(found.notes) == 1


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "multipleOf": 0},
        {"type": "integer", "minimum": 5, "maximum": 1},
        {"type": "string", "format": "date-time", "pattern": "^a"},
        {"allOf": [{"type": "string"}, {"type": "integer"}]},
        {"$ref": "#"},
        {"type": "integer", "multipleOf": 10**12},
        {"type": "array", "minItems": 3, "maxItems": 1},
    ],
)
def test_what_fails_in_any_other_way_goes_too(tokenizer: Any, schema: dict[str, Any]) -> None:
    for is_object in (False, True):
        whole: dict[str, Any] = {
            "type": "object", "properties": {"a": schema}, "required": ["a"]
        }  # fmt: skip
        if schema == {"$ref": "#"}:
            whole = {"type": "object", "allOf": [schema]}
        found = mend(tokenizer, whole, is_object=is_object)
        assert found.notes and found.notes[0].startswith("s")


@pytest.mark.parametrize(
    ("schema", "path"),
    [
        ({"properties": {"a": {"type": "string", "pattern": "(?!a)"}}}, "s.properties.a.pattern"),
        ({"properties": {"a": {"items": {"$ref": "#/x"}}}}, "s.properties.a.items.$ref"),
        ({"type": "any"}, "s.type"),
        ({"anyOf": [{}, {"type": "string", "minLength": None}]}, "s.anyOf[1].minLength"),
        ({"properties": {"a": {"not": {"type": "null"}}}}, "s.properties.a.not"),
        ({"required": None}, "s.required"),
    ],
)
def test_the_fault_of_a_strict_schema_has_a_path(
    tokenizer: Any, schema: dict[str, Any], path: str
) -> None:
    found = mend(tokenizer, schema, strict=True)
    assert found.fault is not None and found.fault.startswith(f"{path}: ")
    assert not found.fault.endswith(":") and "lenient" not in found.fault


def test_overlapping_alternatives_name_what_a_client_can_do(tokenizer: Any) -> None:
    schema = {"properties": {"a": {"oneOf": [{"type": "string"}, {"maxLength": 3}]}}}
    found = mend(tokenizer, schema, strict=True)
    assert found.fault is not None and found.fault.startswith("s.properties.a.oneOf: oneOf cannot")
    assert "anyOf" in found.fault and "coerce" not in found.fault
