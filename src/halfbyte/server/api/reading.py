"""From the bytes of a body to a request of known fields, with its limits counted first."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, TypeVar

import pydantic_core
from pydantic import (
    BaseModel,
    ConfigDict,
    GetJsonSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import CoreSchema

from halfbyte.errors import RequestError
from halfbyte.server.config import Limits

# The most that any configuration takes: token ids, texts, messages, parts of one, tools, stops.
MOST_IDS = 2**20


MOST_TEXTS = 4096


MOST_MESSAGES = 2**16


MOST_PARTS = 1024


MOST_TOOLS = 4096


MOST_STOPS = 1024


class Wire(BaseModel):
    """Base of everything a client sends: strict, closed, finite."""

    model_config = ConfigDict(
        strict=True, extra="forbid", allow_inf_nan=False, frozen=True, hide_input_in_errors=True
    )
    IGNORED: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _drop_absent(cls, value: Any) -> Any:
        """Nulls are absent; fields that change nothing are taken out by name."""
        if not isinstance(value, dict):
            return value
        return {
            key: item for key, item in value.items() if item is not None and key not in cls.IGNORED
        }

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Describe the fields: what may be absent may be null, what is ignored may be sent."""
        schema = handler(core_schema)
        found = handler.resolve_ref_schema(schema)
        required = found.get("required", ())
        found["properties"] = {
            name: said if name in required else {"anyOf": [said, {"type": "null"}]}
            for name, said in found.get("properties", {}).items()
        } | {name: {} for name in sorted(cls.IGNORED)}
        return schema


Request = TypeVar("Request", bound=Wire)


# A text with its quotation marks, as far as it is there; nothing of it is looked at twice.
_TEXT = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)


# Behind a piece: an open text swallows it.
_END = b"\x00"


# Numbers of more digits are slow to read, the slower the longer.
_LONG_NUMBER = 250


_MOST_LONG_NUMBERS = 4000


# Escapes and bytes beyond ASCII that are read whatever the context.
_ODD_BYTES = 1_000_000


_ODD = "escapes or bytes beyond ASCII"


_ASCII = bytes(range(128))


class Structure:
    """Counts of a body, piece by piece; one beyond a limit is refused before it is parsed.

    Brackets are counted everywhere, which costs nothing, the rest outside texts only.
    """

    def __init__(self, limits: Limits, most_text: int | None = None) -> None:
        """Allow `most_text` bytes of text at most in one request; None for no limit."""
        # Written with escapes or beyond ASCII, text takes long to read, and no picture is written
        # so. A byte of text may take two escapes at most, and much may stand in ignored fields.
        most_odd = 2**63 if most_text is None else 2 * most_text + _ODD_BYTES
        self._most = {
            "opening brackets, those in texts included": limits.body_brackets,
            "arrays and objects": limits.body_nodes,
            "commas between values": limits.body_values,
            "field names": limits.body_keys,
            "texts": limits.body_texts,
            "bytes outside texts": limits.body_plain_bytes,
            f"numbers of over {_LONG_NUMBER} digits": _MOST_LONG_NUMBERS,
            _ODD: most_odd,
        }
        self._counts = dict.fromkeys(self._most, 0)
        # What an open text has so far that the next piece may continue: its mark, half an escape.
        self._open = b""

    def add(self, chunk: bytes) -> None:
        """Count one more piece of the body; RequestError beyond a limit."""
        num_brackets = _num(b"[", chunk) + _num(b"{", chunk)
        num_odd = _num(b"\\", chunk)
        if not chunk.isascii():
            num_odd += len(chunk.translate(None, _ASCII))
        was_open = bool(self._open)
        plain, num_texts = self._outside(chunk)
        blocks = range(0, len(plain) - _LONG_NUMBER + 1, _LONG_NUMBER)
        found = (
            num_brackets,
            plain.count(b"[") + plain.count(b"{"),
            plain.count(b","),
            plain.count(b":"),
            num_texts - was_open,
            len(plain),
            sum(plain[start : start + _LONG_NUMBER].isdigit() for start in blocks),
            num_odd,
        )
        for (what, most), count in zip(self._most.items(), found, strict=True):
            self._counts[what] += count
            if self._counts[what] > most:
                known = "any text for this model has" if what == _ODD else "are read"
                raise RequestError(
                    f"the body has more than {most:,} {what}: more than {known}",
                    code="context_length_exceeded" if what == _ODD else "limit_exceeded",
                )

    def _outside(self, chunk: bytes) -> tuple[bytes, int]:
        """A piece without its texts, and how many there were."""
        if self._open and chunk and b'"' not in chunk and b"\\" not in chunk:
            # Amid a long text: nothing to look for.
            self._open = b'"'
            return b"", 1
        whole = self._open + chunk
        plain, num_texts = _TEXT.subn(b" ", whole + _END)
        self._open = b""
        if plain.endswith(_END):
            return plain[:-1], num_texts
        self._open = b'"\\' if _ends_in_escape(whole) else b'"'
        return plain, num_texts


def _num(sign: bytes, chunk: bytes) -> int:
    """How often a sign is there. Finding none is much faster than counting."""
    return chunk.count(sign) if sign in chunk else 0


def _ends_in_escape(text: bytes) -> bool:
    """Whether a backslash at the end escapes what follows."""
    return (len(text) - len(text.rstrip(b"\\"))) % 2 == 1


def parse_json(body: bytes | bytearray) -> Any:
    """Parse a body; RequestError for NaN, lone surrogates, endless nesting and other non-JSON."""
    try:
        # Values are kept once each only for names: looking texts up costs more than it saves.
        return pydantic_core.from_json(body, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        raise RequestError(f"the body is not valid JSON: {error}", code="invalid_json") from error


# Fields that are left out, one after the other, before a body counts as not meant for this route.
_MAX_LEFT_OUT = 200


_MAX_NAMED = 20


_MAX_NAME_CHARS = 100


_MISSING: Any = object()


def parse(
    kind: type[Request],
    value: Any,
    limits: Limits | None = None,
    left_out: list[str] | None = None,
) -> Request:
    """Validate a decoded body; the first problem becomes a RequestError with its path.

    limits     what lists may hold, looked at before any of them is read
    left_out   takes the paths of fields that nobody knows, which are then taken out of `value`, in
               place; None refuses them like any other problem
    """
    if not isinstance(value, dict):
        raise RequestError("the body must be a JSON object", code="invalid_json")
    if limits is not None:
        _check_lists(value, limits)
    num_left_out = 0
    while True:
        try:
            return kind.model_validate(value)
        except ValidationError as error:
            problems = error.errors(include_url=False, include_input=False)
            unknown = [one for one in problems if one["type"] == "extra_forbidden"]
            num_left_out += len(unknown)
            wrong = [one for one in problems if one["type"] != "extra_forbidden"]
            if left_out is None or wrong or num_left_out > _MAX_LEFT_OUT:
                raise _refusal((wrong or problems)[0], value) from error
            for one in unknown:
                place = _place(one, value)
                _take_out(value, place)
                if len(left_out) < _MAX_NAMED:
                    left_out.append(_written(place))


def _check_lists(body: dict[str, Any], limits: Limits) -> None:
    """400 for more entries of something than a server takes."""
    prompt = body.get("prompt")
    is_one_prompt = not isinstance(prompt, list) or not prompt or isinstance(prompt[0], int)
    for name, value, limit in (
        ("messages", body.get("messages"), limits.messages),
        ("input", body.get("input"), limits.messages),
        ("tools", body.get("tools"), limits.tools),
        ("prompt", None if is_one_prompt else prompt, limits.prompts),
        ("stop", body.get("stop"), limits.stops),
        ("stop_token_ids", body.get("stop_token_ids"), limits.stop_tokens),
        ("logit_bias", body.get("logit_bias"), limits.biased_tokens),
    ):
        if isinstance(value, (list, dict)):
            check_count(len(value), limit, name, what=_COUNTED.get(name))

    for name in ("messages", "input"):
        items = body.get(name)
        if isinstance(items, list):
            num_parts = sum(map(_num_parts, items))
            check_count(num_parts, limits.parts, name, what="parts and tool calls")


_COUNTED = {"prompt": "answers", "stop": "stop strings"}


def _num_parts(item: Any) -> int:
    """Parts and tool calls of a message or item."""
    if not isinstance(item, Mapping):
        return 0
    return sum(len(value) for value in item.values() if isinstance(value, list))


def are_many(items: Iterable[Wire | Mapping[str, Any]], most: int) -> bool:
    """Whether messages or items, with the parts and tool calls within, are more than so many."""
    count = 0
    for item in items:
        count += 1 + _num_parts(vars(item) if isinstance(item, Wire) else item)
        if count > most:
            return True
    return False


def check_count(count: int, limit: int, param: str, *, what: str | None = None) -> None:
    """Raise RequestError (400) for more of something than its limit."""
    if count > limit:
        raise RequestError(
            f"{param}: {count} {what or 'entries'}; the limit is {limit}",
            param=param,
            code="limit_exceeded",
        )


def _refusal(problem: Any, value: Any) -> RequestError:
    path = _written(_place(problem, value))
    text = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "union_tag_invalid":
        # In our words: pydantic names functions of ours, and tags for what is left out.
        known = problem["ctx"]["expected_tags"].replace(", 'hosted'", "")
        text = f"{problem['ctx']['tag']!r} is not known here; known are {known}"
    if problem["type"] == "extra_forbidden":
        return RequestError(f"unknown field: {path}", param=path, code="unknown_parameter")
    code = "missing_required_parameter" if problem["type"] == "missing" else "invalid_value"
    return RequestError(f"{path}: {text}" if path else text, param=path or None, code=code)


def _place(problem: Any, value: Any) -> list[str | int]:
    """The steps into a body at which pydantic saw a problem; only a missing field's last is new."""
    return _found(problem["loc"], value, may_be_new=problem["type"] == "missing")[1]


def _found(
    location: tuple[str | int, ...], value: Any, *, may_be_new: bool
) -> tuple[int, list[str | int]]:
    """Steps of a location that enter `value`, and how sure they are (2, 1, 0).

    A location also names members of unions. Such a name may be a key as well, like a text part's
    `text`; of both readings the one counts whose last step is there.
    """
    if not location:
        return 0, []
    step, rest = location[0], location[1:]
    readings: list[tuple[int, list[str | int]]] = []
    entered = _MISSING
    if isinstance(value, list) and isinstance(step, int) and step < len(value):
        entered = value[step]
    elif isinstance(value, dict):
        entered = value.get(step, _MISSING)
    if entered is not _MISSING:
        sure, inside = _found(rest, entered, may_be_new=may_be_new)
        readings.append((sure if rest else 2, [step, *inside]))
    if isinstance(step, str):
        if rest:
            readings.append(_found(rest, value, may_be_new=may_be_new))
        elif may_be_new and isinstance(value, dict):
            readings.append((1, [step]))
    return max(readings, key=lambda reading: reading[0], default=(0, []))


def _written(place: list[str | int]) -> str:
    """`messages[0].content` from its steps."""
    path = ""
    for step in place:
        if isinstance(step, int):
            path += f"[{step}]"
        else:
            # A client may call its fields anything; none of it is left unseen, or fills a screen.
            name = step if step.strip() and step.isprintable() else repr(step)
            name = name if len(name) <= _MAX_NAME_CHARS else f"{name[:_MAX_NAME_CHARS]}..."
            path += f".{name}" if path else name
    return path


def _take_out(value: Any, place: list[str | int]) -> None:
    for step in place[:-1]:
        value = value[step]
    del value[place[-1]]
