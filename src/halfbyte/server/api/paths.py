"""Where a client wrote what a chat request has, for requests that came over another wire.

Errors and warnings name places of the chat request: `messages[2].tool_calls[0].function.name`. Its
messages and tools may be others than the client's, and at other places: instructions come first,
results of tools become messages, hosted tools are left out. A client knows its own places only.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from halfbyte.errors import RequestError

_PLACE = re.compile(
    r"\b(?:messages\[(?P<message>\d+)\]"
    r"(?:\.content\[(?P<part>\d+)\]|\.tool_calls\[(?P<call>\d+)\]|(?P<content>\.content\b))?"
    r"|tools\[(?P<tool>\d+)\])"
    r"(?:\.function\b)?(?P<field>\.[a-z_]+)?"
)
_FIRST_NAME = re.compile(r"[a-z_]+(?:\.json_schema)?(?=$|[\s:.\[])")


@dataclass(slots=True)
class Origin:
    """Where a message comes from; empty where nothing is known beyond the whole.

    content  of a content that is one text or list there, too
    parts    of the parts of its content, in order
    calls    of its tool calls, in order
    """

    whole: str
    content: str = ""
    parts: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Paths:
    """Where the parts of a chat request stood in the client's own request.

    messages  of the chat request's messages, in order
    tools     paths of its tools, in order
    fields    names of fields of messages, parts, calls and tools: the chat request's to the
              client's; "" where the place above says enough
    names     the same for fields of the request itself
    """

    messages: list[Origin]
    tools: list[str]
    fields: Mapping[str, str]
    names: Mapping[str, str]

    def text(self, text: str) -> str:
        """Reword a sentence for the client: its own places, and its name for the first word."""
        return self._renamed(_PLACE.sub(self._place, text))

    def error(self, error: RequestError) -> RequestError:
        """Return the same error with places as the client wrote them."""
        param = None if error.param is None else self.text(error.param)
        return RequestError(
            self.text(str(error)), param=param, code=error.code, status=error.status
        )

    def _renamed(self, text: str) -> str:
        found = _FIRST_NAME.match(text)
        name = self.names.get(found.group()) if found else None
        return text if found is None or name is None else name + text[found.end() :]

    def _place(self, found: re.Match[str]) -> str:
        name = (found["field"] or "").removeprefix(".")
        name = self.fields.get(name, name)
        rest = f".{name}" if name else ""
        if found["tool"] is not None:
            return _at(self.tools, found["tool"], found.group()) + rest
        index = int(found["message"])
        if index >= len(self.messages):
            return found.group()
        origin = self.messages[index]
        if found["part"] is not None:
            default = f"{origin.content or origin.whole}[{found['part']}]"
            return _at(origin.parts, found["part"], default) + rest
        if found["call"] is not None:
            return _at(origin.calls, found["call"], origin.whole) + rest
        if found["content"]:
            return (origin.content or origin.whole) + rest
        return origin.whole + rest


def _at(paths: list[str], place: str, default: str) -> str:
    return paths[int(place)] if int(place) < len(paths) else default
