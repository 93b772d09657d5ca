"""Tools on their way in and out: their schemas, call ids, arguments of earlier calls, new ids."""

import copy
import hashlib
import json
import math
import re
import secrets
import string
from collections.abc import Mapping, Sequence
from typing import Any

import jsonschema
import pydantic_core

from halfbyte.chat.schema import HeldSchema, tidied
from halfbyte.errors import RequestError, in_words

_DRAFT7 = jsonschema.Draft7Validator
_IS_SCHEMA = _DRAFT7(_DRAFT7.META_SCHEMA, format_checker=_DRAFT7.FORMAT_CHECKER)
# What Python's regular expressions say to a pattern that is beyond them.
_BEYOND_PYTHON = (RecursionError, OverflowError)

_ALPHABET = string.ascii_letters + string.digits
CALL_ID_CHARS = 9  # what Mistral's own formats accept, [a-zA-Z0-9]{9}
_OUR_KIND = re.compile(r"[a-zA-Z0-9]{9}\Z")


def new_call_id() -> str:
    """An id for a call that the model has made: nine characters, unguessable."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(CALL_ID_CHARS))


def is_call_id(text: str) -> bool:
    """Whether a text has the form of a model's call id: nine letters and digits."""
    return _OUR_KIND.match(text) is not None


class CallIds:
    """Maps a client's call ids to the nine-character kind, for one request.

    Ids of that kind stay; others ("call_8WxY...") are hashed, so that the same conversation always
    becomes the same prompt. Two ids never share one.
    """

    def __init__(self) -> None:
        self._inside: dict[str, str] = {}
        self._taken: set[str] = set()

    def inside(self, client_id: str) -> str:
        """The id by which the model's format knows a call that the client named otherwise."""
        known = self._inside.get(client_id)
        if known is not None:
            return known
        candidate, salt = client_id, 0
        while not _OUR_KIND.match(candidate) or candidate in self._taken:
            digest = hashlib.sha256(f"{salt}:{client_id}".encode()).digest()
            candidate = "".join(_ALPHABET[byte % 62] for byte in digest[:CALL_ID_CHARS])
            salt += 1
        self._inside[client_id] = candidate
        self._taken.add(candidate)
        return candidate

    def in_the_clients_words(self, text: str) -> str:
        """A message about inside ids, with the ids that the client sent."""
        for client_id, inside in self._inside.items():
            text = text.replace(inside, client_id)
        return text


def shown_schema(
    schema: Mapping[str, Any], path: str, param: str, *, strict: bool
) -> Mapping[str, Any]:
    """A schema as a model is shown it: itself, if it is one of draft 7.

    mistral-common refuses others. If it is not strict the model sees what is left without the
    faulty clauses; RequestError for a strict one.
    """
    try:
        if _IS_SCHEMA.is_valid(schema):
            return schema
        if strict:
            error = next(_IS_SCHEMA.iter_errors(schema))
            place = "".join(f".{step}" for step in error.absolute_path)
            message = f"{path}{place}: {error.message[:300]}"
            raise RequestError(message, param=param, code="unsupported_schema")
        shown: Any = copy.deepcopy(tidied(HeldSchema("", schema, strict=False)).schema)
        # Round by round; a faulty value may hide another.
        while errors := list(_IS_SCHEMA.iter_errors(shown)):
            paths = {tuple(error.absolute_path) for error in errors}
            if () in paths:
                return {}
            for steps in sorted(paths, key=str, reverse=True):
                _drop(shown, steps)
    except _BEYOND_PYTHON as error:
        if strict:
            raise RequestError(
                f"{path}: a pattern in it is too large", param=param, code="unsupported_schema"
            ) from error
        return {}
    return shown if isinstance(shown, Mapping) else {}


def _drop(value: Any, path: tuple[str | int, ...]) -> None:
    """Take one place out of a value, if it is still there."""
    try:
        for step in path[:-1]:
            value = value[step]
        del value[path[-1]]
    except (KeyError, IndexError, TypeError):
        return


def read_arguments(arguments: str, path: str) -> dict[str, Any]:
    """Arguments of an earlier call, as the JSON object they must be; nothing counts as {}.

    Anything else would enter the prompt as a JSON string, which no model was trained on. What
    Python reads beyond JSON is refused: NaN, Infinity, numbers that become infinite, and escapes
    that make half a surrogate pair, which is no text. An object that was cut off is closed behind
    its last whole value: so ends an answer that has met its limit, and clients send it back. A
    brace alone is no such object; no answer of ours ends so (`OpeningBrace`).
    """
    if not arguments.strip():
        return {}
    try:
        try:
            value = json.loads(arguments, parse_constant=_no_constant, parse_float=_finite)
        except json.JSONDecodeError as error:
            if error.msg == "Extra data":
                raise
            value = _begun_object(arguments)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        said = "half a surrogate pair" if isinstance(error, UnicodeError) else in_words(error)
        raise RequestError(f"{path} is not JSON: {said}", param=path) from error
    if not isinstance(value, dict):
        raise RequestError(f"{path} must be a JSON object", param=path)
    return value


def checked_arguments(arguments: str, path: str) -> str:
    """Arguments of an earlier call as text, as the client wrote it unless it was cut off."""
    value = read_arguments(arguments, path)
    try:
        json.loads(arguments)
    except ValueError:
        return json.dumps(value, ensure_ascii=False)
    return arguments


def _begun_object(text: str) -> Any:
    """The values of a JSON object that were there before it was cut off; ValueError for others."""
    if text.strip() == "{":
        raise ValueError("nothing follows its brace; send {} for an empty object")
    value = pydantic_core.from_json(text, allow_inf_nan=False, allow_partial="trailing-strings")
    if not isinstance(value, dict):
        raise ValueError("it is cut off")
    # Numbers too large for JSON's readers are refused as in whole objects.
    return json.loads(json.dumps(value), parse_constant=_no_constant, parse_float=_finite)


class OpeningBrace:
    """Holds back the brace that a call's arguments begin with until something follows it.

    An answer may meet its limit right there. What clients get, and send back, is then a call
    without arguments, which is an empty object, instead of a brace, which is nothing.
    """

    def __init__(self) -> None:
        self._held: str | None = ""

    def feed(self, text: str) -> str:
        """What may be shown after one more piece of the arguments."""
        if self._held is None:
            return text
        self._held += text
        if self._held.strip() in ("", "{"):
            return ""
        shown, self._held = self._held, None
        return shown


_NO_RESULT = "(The call was interrupted and has no result.)"


def with_missing_results(
    messages: Sequence[Mapping[str, Any]],
) -> list[tuple[int, Mapping[str, Any]]]:
    """Messages with their places, and a result for each call that the client left without one.

    An agent whose user breaks in sends the call and then the user's next message; a model's format
    has a result between the two. Made-up results have the place of their call. Calls at the very
    end are left alone: they wait for their results.

    Raises RequestError for a result that no call before it waits for.
    """
    settled: list[tuple[int, Mapping[str, Any]]] = []
    waiting: list[str] = []
    place = 0
    for index, message in enumerate(messages):
        if message["role"] == "tool":
            call_id = message["tool_call_id"]
            if call_id not in waiting:
                path = f"messages[{index}].tool_call_id"
                text = f"{path}: no call before it waits for a result with the id {call_id!r}"
                raise RequestError(text, param=path)
            waiting.remove(call_id)
        else:
            settled += [
                (place, {"role": "tool", "tool_call_id": call_id, "content": _NO_RESULT})
                for call_id in waiting
            ]
            waiting = [call["id"] for call in message.get("tool_calls") or ()]
            place = index
        settled.append((index, message))
    return settled


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:40]} is too large a number")
    return value
