"""What of a client's JSON schema can be held, where the client has not asked for all of it.

Without `strict` a schema is best effort: a clause that llguidance cannot build is left out and
named, and everything else is held. `tidied` settles what can be seen without trying: null keywords,
words that are no types, bounds as wide as the machine's, references that lead nowhere, values that
contradict the type. `mended` finds the rest by trying, and is run where that is safe
(`grammar_trial`). Both take schemas whose depth and size were checked, and give back new ones.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from halfbyte.errors import RequestError

# Tells why a grammar cannot be built; None if it can.
Fails = Callable[[str], str | None]

# Between two tokens of JSON; without a bound a weak model writes blanks until max_tokens.
_WHITE_SPACE = r"[ \t\r\n]{1,64}"

_TYPES = frozenset({"null", "boolean", "object", "array", "number", "integer", "string"})
# Keywords whose value is a schema, a list of them, or schemas by name.
_ONE = frozenset(
    {"additionalItems", "additionalProperties", "contains", "else", "if", "items", "not",
     "propertyNames", "then", "unevaluatedItems", "unevaluatedProperties"}
)  # fmt: skip
_MANY = frozenset({"allOf", "anyOf", "items", "oneOf", "prefixItems"})
_NAMED = frozenset({"$defs", "definitions", "dependentSchemas", "patternProperties", "properties"})
_BOUNDS = frozenset({"exclusiveMaximum", "exclusiveMinimum", "maximum", "minimum"})
_COUNTS = frozenset(
    {"maxItems", "maxLength", "maxProperties", "minItems", "minLength", "minProperties"}
)
_TEXTS = frozenset({"$ref", "format", "pattern"})
# Keywords for which null is a value; anywhere else it says that there is none.
_NULLABLE = frozenset({"const", "default", "example", "examples"})
# Nothing of these can fail in a schema that `tidied` has seen.
_HARMLESS = frozenset(
    {"$comment", "$defs", "$ref", "definitions", "default", "description", "examples",
     "additionalProperties", "items", "properties", "required", "title", "type"}
)  # fmt: skip
# Doubles hold whole numbers up to here, and llguidance reads bounds as doubles.
_EXACT = 2**53
# A bound from here on is the machine's, not the client's.
_WIDE = 2**63 - 1
# More than this of anything does not fit a count of llguidance.
_MANY_OF_ANYTHING = 2**31 - 1
# Tries that mending one schema may take.
_MAX_TRIES = 2000


@dataclass(frozen=True, slots=True)
class HeldSchema:
    """A schema and where it stands in the request, as in "tools[1].function.parameters".

    strict     all of it must be held
    is_object  the value is an object, whatever happens
    """

    path: str
    schema: Mapping[str, Any]
    strict: bool
    is_object: bool = False


@dataclass(frozen=True, slots=True)
class MendedSchema:
    """A schema without the clauses that cannot be held, and what was left out.

    notes  what is not held, each with its path
    fault  why a strict one cannot be held, with its path; None if it can
    """

    schema: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    fault: str | None = None


def guided(schema: Mapping[str, Any], *, lenient: bool) -> str:
    """The schema with our own options; a client's are overwritten, never obeyed."""
    options = {"whitespace_pattern": _WHITE_SPACE, "lenient": lenient}
    return json.dumps({**schema, "x-guidance": options}, ensure_ascii=False)


def object_schema(schema: Mapping[str, Any] | None, path: str) -> dict[str, Any]:
    """A tool's parameters as a schema of objects: arguments are nothing else.

    Raises RequestError for one whose type leaves objects out.
    """
    if not schema:
        return {"type": "object", "properties": {}}
    kind = schema.get("type")
    if kind is None or kind == "object" or (isinstance(kind, list) and "object" in kind):
        return {**schema, "type": "object"}
    shown = json.dumps(kind, ensure_ascii=False)[:100]
    raise RequestError(
        f"{path}: its type is {shown}; the arguments of a tool are an object, so it must be "
        '"object"',
        param="tools",
        code="unsupported_schema",
    )


def wide_bounds(held: HeldSchema) -> Iterator[str]:
    """Names bounds that are held as the nearest double only."""
    for path, node in _nodes(held.schema, held.path):
        for key in sorted(_BOUNDS & node.keys()):
            value = node[key]
            if _is_whole(value) and _EXACT < abs(value) < _WIDE:
                yield f"{path}.{key}: {value} is beyond 2^53 and held as the nearest double"


# --- what can be seen -----------------------------------------------------------------------


def tidied(held: HeldSchema) -> MendedSchema:
    """A schema that is not strict, without what can be seen not to be held."""
    notes: list[str] = []
    schema = _Tidy(held.schema, notes).node(held.schema, held.path, "#", ())
    kind = schema.get("type")
    if held.is_object and isinstance(kind, list) and "object" in kind:
        schema["type"] = "object"
    return MendedSchema(schema, tuple(notes))


class _Tidy:
    def __init__(self, root: Mapping[str, Any], notes: list[str]) -> None:
        self._root = root
        self._notes = notes
        self._has_ids = any("$id" in node or "id" in node for _, node in _nodes(root, ""))
        self._anchors = {
            node.get(key)
            for _, node in _nodes(root, "")
            for key in ("$anchor", "$dynamicAnchor")
            if isinstance(node.get(key), str)
        }

    def node(
        self,
        schema: Mapping[str, Any],
        path: str,
        pointer: str,
        scopes: tuple[tuple[str, Mapping[str, Any]], ...],
    ) -> dict[str, Any]:
        """One schema. `pointer` is its own; `scopes` are schemas around it that define others."""
        if "$defs" in schema or "definitions" in schema:
            scopes = (*scopes, (pointer, schema))
        tidy: dict[str, Any] = {}
        for key, value in schema.items():
            if value is None and key not in _NULLABLE:
                continue
            place, below = f"{path}.{key}", f"{pointer}/{_escaped(key)}"
            if key in _NAMED:
                if self._expect(isinstance(value, Mapping), place, "is not an object"):
                    tidy[key] = {
                        name: self._below(
                            one, f"{place}.{name}", f"{below}/{_escaped(name)}", scopes
                        )
                        for name, one in value.items()
                    }
            elif key in _MANY and isinstance(value, list):
                if key in ("allOf", "anyOf", "oneOf") and not value:
                    self._expect(False, place, "is empty")
                    continue
                tidy[key] = [
                    self._below(one, f"{place}[{index}]", f"{below}/{index}", scopes)
                    for index, one in enumerate(value)
                ]
            elif key in _ONE:
                tidy[key] = self._below(value, place, below, scopes)
            else:
                found = self._value(key, value, schema, place, scopes)
                if found is not None or key in _NULLABLE:
                    tidy[key] = found
        return self._without_contradictions(tidy, path)

    def _below(
        self,
        value: Any,
        path: str,
        pointer: str,
        scopes: tuple[tuple[str, Mapping[str, Any]], ...],
    ) -> Any:
        if isinstance(value, bool):
            return value
        if isinstance(value, Mapping):
            return self.node(value, path, pointer, scopes)
        self._expect(value is None, path, "is not a schema")
        return {}

    def _value(
        self,
        key: str,
        value: Any,
        schema: Mapping[str, Any],
        place: str,
        scopes: tuple[tuple[str, Mapping[str, Any]], ...],
    ) -> Any:
        """What a keyword without schemas becomes; None if it goes."""
        if key == "type":
            return self._type(value, place)
        if key in _BOUNDS:
            return self._bound(value, place)
        if key in _COUNTS:
            return self._count(key, value, place)
        if key in _TEXTS and not self._expect(isinstance(value, str), place, "is not a string"):
            return None
        if key == "$ref":
            return self._reference(value, place, scopes)
        if key == "$schema":
            known = isinstance(value, str) and "json-schema.org" in value
            return value if known else None
        if key == "required":
            texts = isinstance(value, list) and all(isinstance(name, str) for name in value)
            return value if self._expect(texts, place, "is not a list of names") else None
        return value

    def _type(self, value: Any, place: str) -> Any:
        words = value if isinstance(value, list) else [value]
        kinds = ["null" if word is None else str(word).lower() for word in words]
        unknown = [word for word, kind in zip(words, kinds, strict=True) if kind not in _TYPES]
        if unknown or not kinds:
            shown = json.dumps(unknown[0] if unknown else value, ensure_ascii=False)[:100]
            self._expect(False, place, f"{shown} is not a type of JSON schema")
            return None
        return list(dict.fromkeys(kinds)) if isinstance(value, list) else kinds[0]

    def _bound(self, value: Any, place: str) -> Any:
        # In draft 4 an exclusive bound is a yes or no.
        if isinstance(value, bool):
            return value
        if not self._expect(_is_number(value), place, "is not a number"):
            return None
        wide = abs(value) >= _WIDE
        return (
            value if self._expect(not wide, place, "is as wide as the machine's numbers") else None
        )

    def _count(self, key: str, value: Any, place: str) -> Any:
        whole = _is_whole(value) and value >= 0
        if not self._expect(whole, place, "is not a count"):
            return None
        if not self._expect(
            value <= _MANY_OF_ANYTHING, place, "is as wide as the machine's numbers"
        ):
            return None
        return int(value)

    def _reference(
        self, value: str, place: str, scopes: tuple[tuple[str, Mapping[str, Any]], ...]
    ) -> str | None:
        if self._has_ids or value == "#" or self._leads_somewhere(value):
            return value
        # Generators put definitions beside the reference and write it as if they were at the root.
        head, _, name = value[1:].rpartition("/")
        if value.startswith("#") and head in ("/$defs", "/definitions"):
            key = head[1:]
            for pointer, scope in reversed(scopes):
                known = scope.get(key)
                if isinstance(known, Mapping) and _unescaped(name) in known:
                    return f"{pointer}/{key}/{name}"
        self._expect(False, place, f"{value[:100]!r} leads nowhere")
        return None

    def _leads_somewhere(self, reference: str) -> bool:
        if not reference.startswith("#"):
            return False
        if not reference.startswith("#/"):
            return reference[1:] in self._anchors
        return is_there(self._root, reference)

    def _without_contradictions(self, tidy: dict[str, Any], path: str) -> dict[str, Any]:
        """Drop values of which none is of the type: the type says more."""
        if "enum" in tidy:
            values = tidy["enum"]
            good = isinstance(values, list) and len(values) > 0
            if not self._expect(good, f"{path}.enum", "is not a list of values"):
                del tidy["enum"]
            elif not any(_is_of(value, tidy.get("type")) for value in values):
                self._expect(False, f"{path}.enum", "contradicts the type")
                del tidy["enum"]
        if "const" in tidy and not _is_of(tidy["const"], tidy.get("type")):
            self._expect(False, f"{path}.const", "contradicts the type")
            del tidy["const"]
        return tidy

    def _expect(self, good: bool, place: str, complaint: str) -> bool:
        if not good:
            self._notes.append(f"{place} {complaint}")
        return good


def is_there(root: Mapping[str, Any], reference: str) -> bool:
    """Whether a reference of the form "#/a/b" leads to something in this schema."""
    value: Any = root
    for step in reference[2:].split("/"):
        name = _unescaped(step)
        if isinstance(value, Mapping) and name in value:
            value = value[name]
        elif isinstance(value, list) and name.isdecimal() and int(name) < len(value):
            value = value[int(name)]
        else:
            return False
    return isinstance(value, Mapping | bool)


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


def _unescaped(step: str) -> str:
    return unquote(step).replace("~1", "/").replace("~0", "~")


def _is_number(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return _is_number(value) and (isinstance(value, int) or value.is_integer())


def _is_of(value: Any, kinds: Any) -> bool:
    """Whether a value is of a type, or of one of a list."""
    if kinds is None:
        return True
    if isinstance(kinds, list):
        return any(_is_of(value, kind) for kind in kinds)
    if kinds == "integer":
        return _is_whole(value)
    if kinds == "number":
        return _is_number(value)
    types = {"null": type(None), "boolean": bool, "object": Mapping, "array": list, "string": str}
    return isinstance(value, types[kinds])


# --- what has to be tried -------------------------------------------------------------------


def mended(held: HeldSchema, fails: Fails) -> MendedSchema:
    """A schema that can be held, or, if it is strict, where its fault is.

    Every node is tried with its own keywords alone, what is below it left open. Where that fails,
    keywords are added one by one, and those that fail are the culprits. What fails only together
    goes by property of the root, and in the end as a whole.
    """
    mender = _Mender(held, fails)
    message = mender.fault_of(held.schema)
    if message is None:
        return MendedSchema(held.schema)
    if held.strict:
        return MendedSchema(held.schema, fault=mender.located(message))
    return mender.mended(message)


class _Mender:
    def __init__(self, held: HeldSchema, fails: Fails) -> None:
        self._held = held
        self._fails = fails
        self._num_tries = 0
        self._notes: list[str] = []

    def fault_of(self, schema: Mapping[str, Any]) -> str | None:
        self._num_tries += 1
        if self._num_tries > _MAX_TRIES:
            return "it has too many clauses to look for the one that cannot be held"
        return self._fails(f"start: %json {guided(schema, lenient=not self._held.strict)}\n")

    def located(self, message: str) -> str:
        """The path and the reason of the first clause of a strict schema that cannot be held."""
        held = self._held
        for path, node in _nodes(held.schema, held.path):
            reference = node.get("$ref")
            local = isinstance(reference, str) and reference.startswith("#/")
            if local and not is_there(held.schema, node["$ref"]):
                return f"{path}.$ref: {node['$ref'][:100]!r} leads nowhere"
            for key, reason in self._culprits(node):
                return f"{path}.{key}: {reason}"
        return f"{held.path}: {message}"

    def mended(self, message: str) -> MendedSchema:
        """Return a schema without the clauses that no grammar can hold."""
        held = self._held
        schema: Mapping[str, Any] = self._without_culprits(held.schema, held.path)
        found = self.fault_of(schema)
        if found is not None:
            schema = self._without_bad_properties(schema)
            found = self.fault_of(schema)
        if found is not None:
            self._notes.append(f"{held.path}: {found}")
            schema = {"type": "object"} if held.is_object else {}
        return MendedSchema(schema, tuple(self._notes))

    def _without_culprits(self, schema: Mapping[str, Any], path: str) -> dict[str, Any]:
        bad = dict(self._culprits(schema))
        if "patternProperties" in bad:
            # Names that it would have allowed are not forbidden by that.
            bad.setdefault("additionalProperties", "")
        for key, reason in bad.items():
            if reason:
                self._notes.append(f"{path}.{key}: {reason}")
        return _mapped(
            {key: value for key, value in schema.items() if key not in bad},
            lambda one, place: self._without_culprits(one, f"{path}{place}"),
        )

    def _without_bad_properties(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        properties = schema.get("properties")
        if not isinstance(properties, Mapping):
            return schema
        kept: dict[str, Any] = {}
        for name, one in properties.items():
            alone = {**schema, "properties": {name: one}, "required": [name]}
            reason = self.fault_of(alone)
            kept[name] = one if reason is None else {}
            if reason is not None:
                self._notes.append(f"{self._held.path}.properties.{name}: {reason}")
        return {**schema, "properties": kept}

    def _culprits(self, node: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Keywords of one node that cannot be held, and why."""
        if node.keys() <= _HARMLESS and not self._held.strict:
            return
        open_ = {key: value for key, value in _opened(node).items() if key not in ("$ref", "$defs")}
        if not open_ or self.fault_of(open_) is None:
            return
        # The type first: others make sense with it, or not.
        order = sorted(open_, key=lambda key: (key != "type", key != "properties"))
        kept: dict[str, Any] = {}
        for key in order:
            reason = self.fault_of({**kept, key: open_[key]})
            if reason is None:
                kept[key] = open_[key]
            else:
                yield key, reason


def _opened(node: Mapping[str, Any]) -> dict[str, Any]:
    """A node with its own keywords, and anything allowed below."""
    return {
        key: value if key == "additionalProperties" and value is False else below
        for (key, value), below in zip(
            node.items(), _mapped(node, lambda _one, _place: {}).values(), strict=True
        )
    }


def _mapped(
    node: Mapping[str, Any], change: Callable[[Mapping[str, Any], str], Any]
) -> dict[str, Any]:
    """A node whose schemas below are changed; `change` gets each and its path from here."""

    def one(value: Any, place: str) -> Any:
        return change(value, place) if isinstance(value, Mapping) else value

    found: dict[str, Any] = {}
    for key, value in node.items():
        if key in _NAMED and isinstance(value, Mapping):
            found[key] = {name: one(below, f".{key}.{name}") for name, below in value.items()}
        elif key in _MANY and isinstance(value, list):
            found[key] = [one(below, f".{key}[{index}]") for index, below in enumerate(value)]
        elif key in _ONE:
            found[key] = one(value, f".{key}")
        else:
            found[key] = value
    return found


def _nodes(schema: Mapping[str, Any], path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every schema within a schema, itself first, with its path."""
    below: list[tuple[str, Mapping[str, Any]]] = [(path, schema)]
    while below:
        here, node = below.pop()
        yield here, node
        found: dict[str, Mapping[str, Any]] = {}
        _mapped(node, lambda one, place, found=found: found.setdefault(place, one))  # type: ignore[misc]
        below += [(f"{here}{place}", one) for place, one in reversed(found.items())]


_MOST_NOTES = 8


def short_list(notes: Sequence[str]) -> tuple[str, ...]:
    """The first of some notes, and how many more there are."""
    if len(notes) <= _MOST_NOTES:
        return tuple(notes)
    return (*notes[:_MOST_NOTES], f"and {len(notes) - _MOST_NOTES} more")
