"""Pictures of a request beside its JSON: decoded where the body is read, and never text again.

A picture within JSON is one text of up to tens of megabytes. Taking such a text up, searching it
and joining its pieces keep Python's lock for milliseconds each, which every token of every running
answer waits for. So whoever reads a long body takes its pictures out: in their place stands a short
mark, and their bytes follow the request in memory of their own (`aside`), which nobody copies.
"""

import pickle
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from halfbyte.chat.images import ImageLimits, data_url_bytes
from halfbyte.errors import RequestError
from halfbyte.server.api.messages_blocks import Base64Source
from halfbyte.server.api.responses_wire import InputImage
from halfbyte.server.api.wire import ImagePart, ImageUrl

# Characters of a URL from which its picture is taken out.
HELD_FROM = 16_384
# Readers of URLs drop these at both ends (WHATWG URL, "basic URL parser").
AROUND_URLS = "".join(map(chr, range(0x21)))
# What stands for a path that is not known yet.
_HERE = "\0"
_MARK = "held picture "


@dataclass(frozen=True, slots=True)
class Held:
    """A picture's file, or why there is none: a message and its code.

    data  bytes, or a view of them where they have crossed from another process
    """

    data: Any
    problem: tuple[str, str] | None = None

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Beside what is pickled, not within it, where the protocol can do so."""
        data = pickle.PickleBuffer(self.data) if protocol >= 5 else bytes(self.data)
        return Held, (data, self.problem)

    def file(self, path: str) -> memoryview:
        """The picture's bytes; RequestError that names `path` if there are none."""
        if self.problem is not None:
            message, code = self.problem
            raise RequestError(message.replace(_HERE, path), param=path, code=code)
        return memoryview(self.data)


# The pictures of the request that the running task answers.
HELD: ContextVar[list[Held]] = ContextVar("HELD")


def take_out(asked: BaseModel, limits: ImageLimits) -> list[Held]:
    """Take the long pictures out of a validated body, in place; their marks name their places."""
    found: list[Held] = []
    for picture, field, url in _pictures(asked):
        try:
            held = Held(data_url_bytes(url, _HERE, limits))
        except RequestError as error:
            held = Held(b"", (str(error), error.code or "invalid_image_url"))
        mark = f"{_MARK}{len(found)}"
        # The models are frozen for everybody else.
        picture.__dict__[field] = mark if isinstance(picture, Base64Source) else f"data:,{mark}"
        found.append(held)
    return found


def held_picture(url: str) -> Held | None:
    """The picture that a mark stands for in the running request; None for any other URL."""
    _, _, mark = url.partition(",")
    number = mark.removeprefix(_MARK)
    held = HELD.get([])
    if number == mark or not number.isdecimal() or int(number) >= len(held):
        return None
    return held[int(number)]


def _pictures(asked: BaseModel) -> Iterator[tuple[BaseModel, str, str]]:
    """Every long data: URL: what has it, the field, and the URL as one text."""
    left: list[Any] = [asked]
    while left:
        item = left.pop()
        if isinstance(item, (list, tuple)):
            left.extend(reversed(item))
            continue
        if not isinstance(item, BaseModel):
            continue
        field = _field_of(item)
        if field is None:
            left.extend(reversed(list(item.__dict__.values())))
            continue
        value = getattr(item, field)
        if len(value) < HELD_FROM:
            continue
        if isinstance(item, Base64Source):
            yield item, field, f"data:{item.media_type};base64,{value}"
        elif (url := value.strip(AROUND_URLS))[:5].lower() == "data:":
            yield item, field, url


def _field_of(item: BaseModel) -> str | None:
    """The field of a model that holds a picture's URL or data."""
    if isinstance(item, Base64Source):
        return "data"
    if isinstance(item, ImageUrl):
        return "url"
    if isinstance(item, InputImage):
        return "image_url"
    return "image_url" if isinstance(item, ImagePart) and isinstance(item.image_url, str) else None
