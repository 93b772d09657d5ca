"""What every script here shares: where the server is, what is asked, and how a result is told.

A script registers cases and calls `main`, which runs each and prints a line of JSON for it:
`{"case": "tools", "ok": true, "note": ""}`. The cases that have a column of their own in the table
are tools, stream, structured, image and error; all others are listed beside them.
"""

import asyncio
import base64
import inspect
import json
import os
import struct
import sys
import traceback
import zlib
from collections.abc import Callable
from typing import Any

BASE = os.environ.get("HALFBYTE_URL", "http://127.0.0.1:8000")
V1 = BASE + "/v1"
MODEL = "tiny"

CALL = '@call get_weather {"city":"Rome"}'
TOOLS_SCRIPT = CALL + "\n@say It is sunny in Rome."
SAID = "It is sunny in Rome."
THOUGHT_SCRIPT = "@think Let me see. ;; @say Four."
STREAM_SCRIPT = "@say One, two, three, four, five."
PERSON = '{"name":"Ada","age":36}'
PERSON_SCRIPT = "@say " + PERSON
PERSON_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
WEATHER_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "Which city."}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": WEATHER_SCHEMA,
    },
}


def _png() -> bytes:
    """A red square of 28 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    rows = b"".join(b"\0" + b"\xff\0\0" * 28 for _ in range(28))
    head = struct.pack(">IIBBBBB", 28, 28, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


PNG = _png()
PNG_BASE64 = base64.b64encode(PNG).decode()
PNG_URL = "data:image/png;base64," + PNG_BASE64

_CASES: dict[str, Callable[[], Any]] = {}


def case(name: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Register a case; it fails by an exception, and may return a remark."""

    def register(work: Callable[[], Any]) -> Callable[[], Any]:
        _CASES[name] = work
        return work

    return register


def equal(got: Any, wanted: Any) -> None:
    """Raise unless both are the same."""
    if got != wanted:
        raise AssertionError(f"got {got!r}, wanted {wanted!r}")


def main() -> None:
    """Run the cases, or those named on the command line."""
    chosen = sys.argv[1:] or list(_CASES)
    # One loop for all: clients keep connections that belong to it.
    loop = asyncio.new_event_loop()
    for name in chosen:
        try:
            work = _CASES[name]
            note = loop.run_until_complete(work()) if inspect.iscoroutinefunction(work) else work()
            said = {"case": name, "ok": True, "note": note or ""}
        except BaseException as error:
            traceback.print_exc()
            said = {"case": name, "ok": False, "note": f"{type(error).__name__}: {error}"[:400]}
        print(json.dumps(said), flush=True)
