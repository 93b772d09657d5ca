"""Bounds of a template's run: time, characters and items that it may make."""

import re
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import jinja2
import jinja2.sandbox

MAX_SECONDS = 2.0  # of one thread's processor for one rendering; usual ones take milliseconds


MAX_CHARS = 2**25  # of any string on the way


MAX_ITEMS = 10**6  # of any list on the way, and the largest number given to a function


MAX_MADE = 2**30  # bytes of all strings and lists that one rendering makes


_MAX_BITS = 4096  # of a whole number


# Filters that lay text out, some with the square of its length, and what they take.
_LAYS_OUT = {"do_wordwrap", "do_urlize", "do_striptags", "do_pprint"}


_MAX_LAID_OUT = 10_000


MAX_INDENT = 16


_HOLDERS = frozenset({list, tuple, dict})  # the usual ones; asking an abstract class takes long


_PLAIN_CODECS = {"utf-8", "utf8", "ascii", "latin-1", "utf-16", "utf-32"}


# Filters that make as much of something as a number says.
_TAKES_WIDTH = {"do_center", "do_indent", "do_batch", "do_slice"}


_LONG_NUMBER = re.compile(r"\d{5}")


class BoundError(Exception):
    """Raised where a template asks for more than it may have."""


class _Bounds(threading.local):
    """What one thread's rendering has used.

    ends   when it must have ended, in seconds of `time.thread_time`
    made   bytes of the strings and lists that it has made
    known  weights of what it was given, by identity: that stays while it runs
    """

    ends: float | None = None
    made: int = 0

    def __init__(self) -> None:
        self.known: dict[int, int] = {}


running_bounds = _Bounds()


def check_time() -> None:
    """Raise BoundError if the template has run for too long."""
    if running_bounds.ends is not None and time.thread_time() > running_bounds.ends:
        raise BoundError(f"it runs for more than {MAX_SECONDS:g} s")


def check_chars(count: int) -> None:
    """Raise BoundError if a text of so many characters is too long."""
    if count > MAX_CHARS:
        raise BoundError(f"it makes a text of {count:,} characters; the limit is {MAX_CHARS:,}")


def check_items(count: int) -> None:
    """Raise BoundError if so many items are too many."""
    if count > MAX_ITEMS:
        raise BoundError(f"it asks for {count:,} items; the limit is {MAX_ITEMS:,}")


def check_arguments(values: Iterable[Any]) -> None:
    """Raise BoundError if an argument of a call is too large a number."""
    for value in values:
        if isinstance(value, int):
            check_items(abs(value))


def _is_holder(value: Any) -> bool:
    """Whether a value holds others that are written, compared or hashed with it."""
    if type(value) in _HOLDERS:
        return True
    return (
        isinstance(value, Collection)
        and not isinstance(value, (str, bytes, bytearray, range))
        and not isinstance(value, jinja2.Undefined)
    )


def weight_of(value: Any, known: dict[int, int], most: int | None = MAX_CHARS) -> int:
    """Characters and items of a value written out in full, what it holds twice counted twice.

    known   weights of holders by identity; filled, so that each is looked into once
    """
    if isinstance(value, (str, bytes, bytearray)):
        return 1 + len(value)
    if not _is_holder(value):
        return 1
    found = known.get(id(value))
    if found is None:
        found = known[id(value)] = 1  # until it is known; what holds itself is written once
        for item in value:
            found += weight_of(item, known, most)
        if isinstance(value, Mapping):
            for item in value.values():
                found += weight_of(item, known, most)
        known[id(value)] = found
        if most is not None and found > most:
            raise BoundError(
                f"written out, a value that it makes has more than {most:,} characters and items"
            )
    return found


class _Known(dict[int, int]):
    """Weights found now, before those of what the rendering was given."""

    def get(self, key: int, default: Any = None) -> Any:
        found = super().get(key)
        return running_bounds.known.get(key, default) if found is None else found


def kept_value(value: Any) -> Any:
    """Return a value that an expression has made, if a template may have it."""
    if isinstance(value, (str, bytes, bytearray)):
        check_chars(len(value))
        num_bytes = len(value) if not isinstance(value, str) or value.isascii() else 4 * len(value)
        # `Written` has a flag for each character.
        running_bounds.made += 2 * num_bytes
    elif _is_holder(value):
        check_items(len(value))
        weight_of(value, _Known())
        running_bounds.made += 16 * len(value)
    if running_bounds.made > MAX_MADE:
        raise BoundError(f"it makes more than {MAX_MADE:,} bytes of text and lists")
    return value


def check_form(form: str) -> None:
    """Refuse wide fields: "{:>9999999}" or "%9999999d" make text out of nothing."""
    if _LONG_NUMBER.search(form):
        raise BoundError(f"it formats with a width as in {form[:40]!r}")


def check_bits(bits: int) -> None:
    """Raise BoundError if a number of so many bits is too long."""
    if bits > _MAX_BITS:
        raise BoundError(f"it computes a number of {bits:,} bits; the limit is {_MAX_BITS:,}")


def text_length(value: Any) -> int:
    """Characters of a value when it is turned into text, at most."""
    return len(value) if isinstance(value, str) else weight_of(value, _Known())


def check_growth(owner: Any, name: str, args: tuple[Any, ...]) -> None:
    """Refuse methods of Python's own types that make much out of little."""
    if not isinstance(owner, (str, bytes, bytearray, int, float, list, tuple, dict)):
        return
    check_arguments(args)
    if not isinstance(owner, (str, bytes, bytearray)):
        return
    if name == "replace" and len(args) >= 2 and isinstance(args[0], type(owner).__mro__[-2]):
        check_chars(_replaced_length(owner, args[0], args[1]))
    elif name == "join" and args and isinstance(args[0], (list, tuple)):
        check_chars(sum(len(part) + len(owner) for part in args[0] if isinstance(part, str)))
    elif name in ("center", "ljust", "rjust", "zfill", "expandtabs"):
        tabs = 1 + (owner.count("\t") if isinstance(owner, str) else owner.count(b"\t"))
        check_chars(tabs * max((arg for arg in args if isinstance(arg, int)), default=8))
    elif name in ("encode", "decode"):
        # Others take the square of a text's length.
        if any(str(one).lower() not in _PLAIN_CODECS for one in args[:1]):
            raise BoundError(f"it asks for the encoding {str(args[0])[:40]!r}")
    elif name == "translate" and args and isinstance(args[0], Mapping):
        longest = max((len(new) for new in args[0].values() if isinstance(new, str)), default=1)
        check_chars(len(owner) * max(longest, 1))
    elif name in ("split", "rsplit", "splitlines"):
        # Separators of one character at least; white space by the sign of it that is there.
        separators = (*args[:1],) if args and args[0] else " \t\n\r\v\f\x85\u2028\u2029"
        if isinstance(owner, str):
            check_items(sum(owner.count(one) for one in separators if isinstance(one, str)))
        else:
            check_items(len(owner))


def _replaced_length(text: Any, old: Any, new: Any) -> int:
    count = text.count(old) if old else len(text) + 1
    return len(text) + count * len(new)


def bounded_call(function: Callable[..., Any]) -> Callable[..., Any]:
    """Call a filter, with an eye on the time, on its arguments and on its result."""
    takes_first = hasattr(function, "jinja_pass_arg")

    def bounded(*args: Any, **kwargs: Any) -> Any:
        check_time()
        given = args[1:] if takes_first else args
        _check_filtered(function.__name__, given, kwargs)
        result = function(*args, **kwargs)
        return ticking(result) if isinstance(result, Iterator) else kept_value(result)

    if takes_first:
        bounded.jinja_pass_arg = function.jinja_pass_arg  # type: ignore[attr-defined]
    return bounded


def _check_filtered(name: str, given: tuple[Any, ...], options: Mapping[str, Any]) -> None:
    """Refuse what a filter would take too long for, or make too much of."""
    value = given[0] if given else None
    others = (*given[1:], *options.values())
    if name in _TAKES_WIDTH:
        check_arguments(others)
    if name in _LAYS_OUT:
        for one in (value, *others):
            if text_length(one) > _MAX_LAID_OUT:
                raise BoundError(f"it lays out a text of over {_MAX_LAID_OUT:,} characters")
    elif name == "do_sum":
        # Lists would be copied as often as there are of them.
        if any(isinstance(one, Collection) for one in (*given[2:], options.get("start"))):
            raise BoundError("it adds up something that is not a number")
    elif name in ("do_list", "do_reverse") and isinstance(value, (str, range)):
        check_items(len(value))
    elif name == "do_indent" and isinstance(value, str):
        width = max((asked_width(one) for one in others), default=4)
        check_chars((len(value.splitlines()) + 1) * width + len(value))
    elif name == "do_replace" and isinstance(value, str):
        check_growth(value, "replace", given[1:])
    elif name == "do_format" and isinstance(value, str):
        check_form(value)
        check_chars((value.count("%") + 1) * max(map(text_length, others), default=0))


def asked_width(value: Any) -> int:
    """Characters that a width, or a text in its place, asks for."""
    return value if isinstance(value, int) else text_length(value)


def ticking(items: Iterator[Any]) -> Iterator[Any]:
    """Pass items on, with a look at the time before each."""
    for item in items:
        check_time()
        yield item
