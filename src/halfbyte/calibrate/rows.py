"""One row of a post-training data set: read from a file, then understood as a conversation.

Files are read line by line, because columns differ between the shards of one data set and no table
schema fits them all. What a row may look like, odd cases included, is `parse_row`'s business.
"""

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from halfbyte.errors import UnsupportedError, in_words

# A longer line is damage, not a conversation; reading it would exhaust the memory.
MAX_LINE_BYTES = 64 << 20
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
# Files of plain text; a paragraph is a row.
TEXT_SUFFIXES = (".txt", ".md")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
# Pictures of one row; the server's limit is a request's as well.
MAX_PICTURES = 32

_ROLES = {"system", "developer", "user", "assistant", "tool"}
# Column of what is asked -> columns that its answer may stand in.
_EXCHANGES = {
    "prompt": ("response", "completion", "answer", "output"),
    "instruction": ("output", "response"),
    "question": ("answer", "response"),
}
# Names of the same three roles in older collections.
_OTHER_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "function": "tool"}


class BadRowError(Exception):
    """A line or row that cannot be understood; counted and named by the caller, never hidden."""


@dataclass(frozen=True, slots=True)
class Line:
    """One row as stored: its bytes, or why they could not be had. `number` counts from 1."""

    number: int
    data: bytes
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class ParsedRow:
    """What a row says: messages and tools in the form that `chat` encodes.

    messages  role and content; `reasoning_content` where there is some; `tool_calls` with string
              arguments; `tool_call_id` on tool messages. Content is a string, or where there are
              pictures parts: {"type": "text", "text"} and {"type": "image", "image"}, the latter
              the name of a file, a data: URL or a reference to a drawn picture
    text      a row that is a plain document has this and no messages
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    text: str = ""
    uuid: str | None = field(default=None, compare=False)

    @property
    def has_reasoning(self) -> bool:
        """Whether any turn of the assistant carries the thought that led to it."""
        return any("reasoning_content" in message for message in self.messages)

    @property
    def has_pictures(self) -> bool:
        """Whether any turn of the conversation shows a picture."""
        return any(isinstance(message["content"], list) for message in self.messages)

    def strings(self) -> Iterator[str]:
        """Every text that a person or model wrote in the conversation."""
        if self.text:
            yield self.text
        for message in self.messages:
            yield text_of(message)
            if "reasoning_content" in message:
                yield message["reasoning_content"]


def text_of(message: Mapping[str, Any]) -> str:
    """The text of a message as `parse_row` gives it, without its pictures."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part["type"] == "text")


def read_row_lines(file: BinaryIO, name: str) -> Iterator[Line]:
    """The rows of one open file by the suffix of its name; blank lines are no rows.

    A compressed file that ends too early gives its rows and then one with a problem. A row of a
    parquet file comes as one line of JSON. Raises UnsupportedError if pyarrow is needed and absent.
    """
    if name.endswith(".parquet"):
        yield from _parquet_lines(file, name)
    elif name.endswith(TEXT_SUFFIXES):
        yield from _paragraphs(file)
    elif name.endswith(".gz"):
        with gzip.GzipFile(fileobj=file) as unpacked:
            yield from _text_lines(unpacked)
    else:
        yield from _text_lines(file)


def _text_lines(file: BinaryIO | gzip.GzipFile) -> Iterator[Line]:
    number = 0
    while True:
        number += 1
        try:
            data = file.readline(MAX_LINE_BYTES)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            yield Line(
                number, b"", f"the compressed data is damaged or cut off ({in_words(error)})"
            )
            return
        if not data:
            return
        if len(data) == MAX_LINE_BYTES and not data.endswith(b"\n"):
            yield Line(number, b"", f"the line does not end within {MAX_LINE_BYTES >> 20} MiB")
            return
        if data.strip():
            yield Line(number, data)


def _paragraphs(file: BinaryIO) -> Iterator[Line]:
    """Lines up to the next blank one, as a plain document that has the number of its first line."""
    block: list[Line] = []
    for line in _text_lines(file):
        if block and (line.problem is not None or line.number != block[-1].number + 1):
            yield _document(block)
            block = []
        if line.problem is not None:
            yield line
        else:
            block.append(line)
    if block:
        yield _document(block)


def _document(block: list[Line]) -> Line:
    number = block[0].number
    try:
        text = b"".join(line.data for line in block).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return Line(number, b"", f"not UTF-8 ({error.reason}); save the file as UTF-8")
    return Line(number, json.dumps({"text": text.strip()}).encode())


def _parquet_lines(file: BinaryIO, name: str) -> Iterator[Line]:
    try:
        from pyarrow import ArrowException, parquet  # optional: only for parquet files
    except ImportError as error:
        raise UnsupportedError(
            f"{name}: parquet files need pyarrow (pip install pyarrow)"
        ) from error
    number = 0
    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=32):
            for row in batch.to_pylist():
                number += 1
                yield Line(number, json.dumps(row, ensure_ascii=False, default=str).encode())
    except (ArrowException, OSError) as error:
        yield Line(number + 1, b"", f"the parquet data is damaged ({in_words(error)})")


def parse_line(line: Line) -> dict[str, Any]:
    """The JSON object of a line. Raises BadRowError saying what is wrong with it."""
    if line.problem is not None:
        raise BadRowError(line.problem)
    try:
        value = json.loads(line.data)
    except (ValueError, RecursionError) as error:
        raise BadRowError(f"it is not JSON ({in_words(error)})") from error
    if not isinstance(value, dict):
        raise BadRowError(f"a JSON object was expected, not {type(value).__name__}")
    return value


def parse_row(raw: Mapping[str, Any]) -> ParsedRow:
    """Understand a row that holds a conversation, a plain document or one exchange.

    That is `messages`, `text`, or `prompt` and `response`, `instruction` and `output` and the
    like. Survived: messages, tool_calls and tools as JSON strings; null content; calls whose
    arguments are an object or a string; calls and results without ids; tools not wrapped in a
    `function`; empty system turns (dropped: they say nothing); columns we have no use for. Raises
    BadRowError.
    """
    uuid = raw.get("uuid")
    uuid = uuid if isinstance(uuid, str) else None
    messages = _unstringed(raw.get("messages", raw.get("conversations")), "messages")
    if messages is None:
        text = raw.get("text")
        if isinstance(text, str):
            return ParsedRow((), text=text, uuid=uuid)
        return ParsedRow(_with_pictures(_exchange(raw), raw), uuid=uuid)
    if not isinstance(messages, list):
        raise BadRowError(f"messages: a list was expected, not {type(messages).__name__}")
    calls: list[str] = []
    parsed = [_message(item, f"messages[{n}]", calls) for n, item in enumerate(messages)]
    kept = tuple(m for m in parsed if m["role"] != "system" or text_of(m).strip())
    if sum(map(_num_pictures, kept)) > MAX_PICTURES:
        raise BadRowError(f"{sum(map(_num_pictures, kept))} pictures; at most {MAX_PICTURES}")
    return ParsedRow(kept, _tools(raw.get("tools")), uuid=uuid)


def _num_pictures(message: Mapping[str, Any]) -> int:
    content = message["content"]
    return 0 if isinstance(content, str) else sum(part["type"] == "image" for part in content)


def _with_pictures(
    messages: tuple[Mapping[str, Any], ...], raw: Mapping[str, Any]
) -> tuple[Mapping[str, Any], ...]:
    """An exchange with the pictures of columns `image` or `images` before its question."""
    named = raw.get("images", raw.get("image"))
    if not named:  # nothing, an empty name, an empty list
        return messages
    named = [named] if isinstance(named, str) else named
    if not isinstance(named, list) or len(named) > MAX_PICTURES:
        raise BadRowError(f"images: a file name or a list of 1 to {MAX_PICTURES} was expected")
    number = next(n for n, message in enumerate(messages) if message["role"] == "user")
    asked = messages[number]
    parts = [{"type": "image", "image": _picture(name, "images")} for name in named]
    content = [*parts, {"type": "text", "text": asked["content"]}]
    return (*messages[:number], {**asked, "content": content}, *messages[number + 1 :])


def _exchange(raw: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """A question and its answer, which older collections keep in two columns."""
    for asked, answers in _EXCHANGES.items():
        answered = next((name for name in answers if isinstance(raw.get(name), str)), None)
        if answered is None or not isinstance(raw.get(asked), str):
            continue
        more = raw.get("input") if asked == "instruction" else None
        parts = [raw[asked], more] if isinstance(more, str) and more.strip() else [raw[asked]]
        system = raw.get("system")
        first = [{"role": "system", "content": system}]
        return (
            *(first if isinstance(system, str) and system.strip() else ()),
            {"role": "user", "content": "\n\n".join(parts)},
            {"role": "assistant", "content": raw[answered]},
        )
    fields = ", ".join(sorted(map(str, raw))[:8])[:100] or "none"
    raise BadRowError(
        f"it has neither messages nor text, nor a prompt with a response, but {fields}"
    )


def _unstringed(value: Any, where: str) -> Any:
    """Some shards hold a list or an object as JSON text."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRowError(f"{where}: a string that is not JSON") from error


def _message(raw: Any, where: str, calls: list[str]) -> dict[str, Any]:
    """One message; `calls` are the ids of calls that still wait for their result."""
    raw = _unstringed(raw, where)
    if not isinstance(raw, Mapping):
        raise BadRowError(f"{where}: an object was expected, not {type(raw).__name__}")
    role = raw.get("role", raw.get("from"))
    role = _OTHER_ROLES.get(role, role) if isinstance(role, str) else role
    if role not in _ROLES:
        raise BadRowError(f"{where}: role {role!r}")
    role = "system" if role == "developer" else role
    content = _content(raw.get("content", raw.get("value")), where)
    if not isinstance(content, str) and role != "user":
        raise BadRowError(f"{where}: pictures in a turn of the {role}")
    message: dict[str, Any] = {"role": role, "content": content}
    if role == "assistant":
        thought = raw.get("reasoning_content") or raw.get("reasoning")
        if isinstance(thought, str) and thought.strip():
            message["reasoning_content"] = thought
        made = _calls(raw.get("tool_calls"), f"{where}.tool_calls", len(calls))
        if made:
            message["tool_calls"] = made
            calls[:] = [call["id"] for call in made]
    if role == "tool":
        stated = raw.get("tool_call_id")
        if stated in calls:
            calls.remove(stated)
        elif calls:
            stated = calls.pop(0)
        message["tool_call_id"] = str(stated or "call-0")
    return message


def _content(value: Any, where: str) -> str | list[dict[str, str]]:
    """Content as one string: null is empty, parts are joined, other JSON is written out.

    Where a part is a picture, the parts stay.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, Mapping) for part in value):
        if any(part.get("type") in _PICTURE_PARTS for part in value):
            return [_part(part, where) for part in value]
        parts = [part.get("text") for part in value]
        if not all(isinstance(part, str) for part in parts):
            raise BadRowError(f"{where}: content with parts other than text and pictures")
        return "\n".join(str(part) for part in parts)
    return json.dumps(value, ensure_ascii=False)


_PICTURE_PARTS = ("image", "image_url", "input_image")


def _part(part: Mapping[str, Any], where: str) -> dict[str, str]:
    """A text or a picture, the latter in OpenAI's form or with its file under `image`."""
    if part.get("type") not in _PICTURE_PARTS:
        if not isinstance(part.get("text"), str):
            raise BadRowError(f"{where}: content with parts other than text and pictures")
        return {"type": "text", "text": part["text"]}
    named = next((part[key] for key in ("image", "image_url", "path", "url") if key in part), None)
    if isinstance(named, Mapping):
        named = named.get("url", named.get("path"))
    return {"type": "image", "image": _picture(named, where)}


def _picture(named: Any, where: str) -> str:
    if not isinstance(named, str) or not named:
        raise BadRowError(f"{where}: a picture is a file name or a data: URL")
    if "://" in named[:16]:
        raise BadRowError(f"{where}: {named[:60]} is not fetched; put the file beside the rows")
    return named


def _calls(value: Any, where: str, number: int) -> list[dict[str, Any]]:
    value = _unstringed(value, where)
    if value is None:
        return []
    if not isinstance(value, list):
        raise BadRowError(f"{where}: a list was expected, not {type(value).__name__}")
    made = []
    for offset, item in enumerate(value):
        function = _function(item, f"{where}[{offset}]")
        call = _unstringed(item, where)
        made.append(
            {
                "id": str(call.get("id") or f"call-{number + offset}"),
                "type": "function",
                "function": {
                    "name": function["name"],
                    "arguments": _arguments(function.get("arguments"), f"{where}[{offset}]"),
                },
            }
        )
    return made


def _function(value: Any, where: str) -> Mapping[str, Any]:
    """The named function of a call or a tool, whether wrapped in `function` or not."""
    outer = _unstringed(value, where)
    inner = outer.get("function", outer) if isinstance(outer, Mapping) else None
    function = _unstringed(inner, where)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadRowError(f"{where}: the call has no function name")
    return function


def _arguments(value: Any, where: str) -> str:
    """Arguments as the JSON text of an object, which is what chat formats take."""
    parsed = _unstringed(value, where)
    if parsed is None:
        return "{}"
    if not isinstance(parsed, Mapping):
        raise BadRowError(f"{where}: the arguments are not a JSON object")
    return json.dumps(parsed, ensure_ascii=False)


def _tools(value: Any) -> tuple[dict[str, Any], ...]:
    value = _unstringed(value, "tools")
    if not value:
        return ()
    if not isinstance(value, list):
        raise BadRowError(f"tools: a list was expected, not {type(value).__name__}")
    return tuple(
        {"type": "function", "function": _plain_function(_function(item, f"tools[{number}]"))}
        for number, item in enumerate(value)
    )


def _plain_function(function: Mapping[str, Any]) -> dict[str, Any]:
    """Name, description and parameters; parquet fills columns a tool does not have with null."""
    plain = {"name": function["name"], "description": function.get("description") or ""}
    parameters = _unstringed(function.get("parameters"), "tools")
    return {**plain, "parameters": _without_nulls(parameters or {})}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
