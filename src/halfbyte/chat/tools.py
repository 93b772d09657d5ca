"""Tools on their way in and out: call ids, arguments of earlier calls, new ids."""

import hashlib
import json
import math
import re
import secrets
import string
from typing import Any

from halfbyte.errors import RequestError

_ALPHABET = string.ascii_letters + string.digits
_CALL_ID_LENGTH = 9  # what Mistral's own formats accept, [a-zA-Z0-9]{9}
_OUR_KIND = re.compile(r"[a-zA-Z0-9]{9}\Z")


def new_call_id() -> str:
    """An id for a call that the model has made: nine characters, unguessable."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(_CALL_ID_LENGTH))


class CallIds:
    """Maps a client's call ids to the nine-character kind, for one request.

    Ids of that kind stay; others ("call_8WxY...") are hashed, so that the same conversation always
    becomes the same prompt. Two ids never share one.
    """

    def __init__(self) -> None:
        self._inside: dict[str, str] = {}
        self._taken: set[str] = set()

    def inside(self, client_id: str) -> str:
        """The id that the model's format sees."""
        known = self._inside.get(client_id)
        if known is not None:
            return known
        candidate, salt = client_id, 0
        while not _OUR_KIND.match(candidate) or candidate in self._taken:
            digest = hashlib.sha256(f"{salt}:{client_id}".encode()).digest()
            candidate = "".join(_ALPHABET[byte % 62] for byte in digest[:_CALL_ID_LENGTH])
            salt += 1
        self._inside[client_id] = candidate
        self._taken.add(candidate)
        return candidate

    def in_the_clients_words(self, text: str) -> str:
        """A message about inside ids, with the ids that the client sent."""
        for client_id, inside in self._inside.items():
            text = text.replace(inside, client_id)
        return text


def read_arguments(arguments: str, path: str) -> dict[str, Any]:
    """Arguments of an earlier call, as the JSON object they must be; nothing counts as {}.

    Anything else would enter the prompt as a JSON string, which no model was trained on. What
    Python reads beyond JSON is refused: NaN, Infinity, numbers that become infinite, and escapes
    that make half a surrogate pair, which is no text.
    """
    if not arguments.strip():
        return {}
    try:
        value = json.loads(arguments, parse_constant=_no_constant, parse_float=_finite)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        reason = "half a surrogate pair" if isinstance(error, UnicodeError) else str(error)
        raise RequestError(f"{path} is not JSON: {reason}", param=path) from error
    if not isinstance(value, dict):
        raise RequestError(f"{path} must be a JSON object", param=path)
    return value


def checked_arguments(arguments: str, path: str) -> str:
    """The same as text, as the client wrote it."""
    read_arguments(arguments, path)
    return arguments if arguments.strip() else "{}"


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:40]} is too large a number")
    return value
