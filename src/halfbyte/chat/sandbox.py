"""Where chat templates run: Jinja's immutable sandbox, with bounds, over `written` text.

A template is a program out of a downloaded file. It can neither reach Python nor run for ever nor
fill the memory: time is looked at in every turn of a loop and at every call, sizes before a string
or a list grows, and every value that a template makes is weighed as if it were written out, so that
none can hold another over and over. So each operation on values has a most, whichever it is. What
it writes comes out as `Written`, its own characters told from a client's. The extensions are those
that transformers gives templates (chat_template_utils).
"""

import datetime
import json
import re
import string
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NoReturn

import jinja2
import jinja2.sandbox
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.utils import Namespace
from markupsafe import Markup

from halfbyte.chat.written import Written, formatted, joined, own
from halfbyte.errors import CheckpointError, RequestError

MAX_SOURCE = 2**20  # characters of a template; the longest in use have 30,000
MAX_SECONDS = 2.0  # of one thread's processor for one rendering; usual ones take milliseconds
MAX_CHARS = 2**25  # of any string on the way
MAX_ITEMS = 10**6  # of any list on the way, and the largest number given to a function
MAX_MADE = 2**30  # bytes of all strings and lists that one rendering makes
_MAX_BITS = 4096  # of a whole number
# Filters that lay text out, some with the square of its length, and what they take.
_LAYS_OUT = {"do_wordwrap", "do_urlize", "do_striptags", "do_pprint"}
_MAX_LAID_OUT = 10_000
_MAX_INDENT = 16
_HOLDERS = frozenset({list, tuple, dict})  # the usual ones; asking an abstract class takes long
_PLAIN_CODECS = {"utf-8", "utf8", "ascii", "latin-1", "utf-16", "utf-32"}
# Filters that make as much of something as a number says.
_TAKES_WIDTH = {"do_center", "do_indent", "do_batch", "do_slice"}
_LONG_NUMBER = re.compile(r"\d{5}")


class TemplateRefusalError(Exception):
    """The template called raise_exception."""


class _BoundError(Exception):
    """The template asks for more than a template may."""


class ChatTemplate:
    """One compiled template."""

    def __init__(self, source: str, where: str) -> None:
        """Raises CheckpointError naming `where` if it does not compile."""
        if len(source) > MAX_SOURCE:
            raise CheckpointError(
                f"{where}: a chat template of {len(source):,} characters; "
                f"the limit is {MAX_SOURCE:,}"
            )
        try:
            self._template = _Environment().from_string(source)
        # Jinja gives up in its own words, Python's compiler (nesting) and its stack in theirs.
        except Exception as error:
            message = f"{where}: chat template does not compile: {_first_line(error)}"
            raise CheckpointError(message) from error

    def render(self, values: Mapping[str, Any]) -> Written:
        """The rendered text. RequestError in the template's words where it refuses or fails."""
        _bounds.ends = time.thread_time() + MAX_SECONDS
        _bounds.made, _bounds.known = 0, {}
        try:
            # What the conversation holds is weighed once, however often it is passed on.
            for value in values.values():
                _weight(value, _bounds.known, most=None)
            text = self._template.render(values)
        except TemplateRefusalError as error:
            raise RequestError(str(error), param="messages") from error
        # A template is foreign code: whatever it raises is its fault or the conversation's.
        except Exception as error:
            reason = _first_line(error) or type(error).__name__
            message = f"the model's chat template cannot render this conversation: {reason}"
            raise RequestError(message, param="messages") from error
        finally:
            _bounds.ends = None
            _bounds.known = {}
        assert isinstance(text, Written)
        return text


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


_bounds = _Bounds()


def _check_time() -> None:
    if _bounds.ends is not None and time.thread_time() > _bounds.ends:
        raise _BoundError(f"it runs for more than {MAX_SECONDS:g} s")


def _check_chars(count: int) -> None:
    if count > MAX_CHARS:
        raise _BoundError(f"it makes a text of {count:,} characters; the limit is {MAX_CHARS:,}")


def _check_items(count: int) -> None:
    if count > MAX_ITEMS:
        raise _BoundError(f"it asks for {count:,} items; the limit is {MAX_ITEMS:,}")


def _check_arguments(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, int):
            _check_items(abs(value))


def _is_holder(value: Any) -> bool:
    """Whether a value holds others that are written, compared or hashed with it."""
    if type(value) in _HOLDERS:
        return True
    return (
        isinstance(value, Collection)
        and not isinstance(value, (str, bytes, bytearray, range))
        and not isinstance(value, jinja2.Undefined)
    )


def _weight(value: Any, known: dict[int, int], most: int | None = MAX_CHARS) -> int:
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
            found += _weight(item, known, most)
        if isinstance(value, Mapping):
            for item in value.values():
                found += _weight(item, known, most)
        known[id(value)] = found
        if most is not None and found > most:
            raise _BoundError(
                f"written out, a value that it makes has more than {most:,} characters and items"
            )
    return found


class _Known(dict[int, int]):
    """Weights found now, before those of what the rendering was given."""

    def get(self, key: int, default: Any = None) -> Any:
        found = super().get(key)
        return _bounds.known.get(key, default) if found is None else found


def _kept(value: Any) -> Any:
    """A value that an expression has made, if a template may have it."""
    if isinstance(value, (str, bytes, bytearray)):
        _check_chars(len(value))
        num_bytes = len(value) if not isinstance(value, str) or value.isascii() else 4 * len(value)
        # `Written` has a flag for each character.
        _bounds.made += 2 * num_bytes
    elif _is_holder(value):
        _check_items(len(value))
        _weight(value, _Known())
        _bounds.made += 16 * len(value)
    if _bounds.made > MAX_MADE:
        raise _BoundError(f"it makes more than {MAX_MADE:,} bytes of text and lists")
    return value


def _check_form(form: str) -> None:
    """Widths in a format, "{:>9999999}" or "%9999999d", make text out of nothing."""
    if _LONG_NUMBER.search(form):
        raise _BoundError(f"it formats with a width as in {form[:40]!r}")


def _first_line(error: Exception) -> str:
    return (str.__str__(str(error)).splitlines() or [""])[0]


class _Code(CodeGenerator):
    """Python code in which every constant of the template says whose it is."""

    def visit_Const(self, node: nodes.Const, frame: Frame) -> None:
        value = node.as_const(frame.eval_ctx)
        if isinstance(value, str):
            self.write(f"environment.constant({value!r})")
        else:
            super().visit_Const(node, frame)

    def visit_TemplateData(self, node: nodes.TemplateData, frame: Frame) -> None:
        self.write(f"environment.constant({node.data!r})")

    def _output_const_repr(self, group: Iterable[Any]) -> str:
        return f"environment.constant({''.join(map(str, group))!r})"

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._keep(super().visit_List, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._keep(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._keep(super().visit_Dict, node, frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        # A slice is a copy.
        if isinstance(node.arg, nodes.Slice):
            self._keep(super().visit_Getitem, node, frame)
        else:
            super().visit_Getitem(node, frame)

    def _keep(self, visit: Callable[[Any, Frame], None], node: nodes.Expr, frame: Frame) -> None:
        self.write("environment.kept(")
        visit(node, frame)
        self.write(")")

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat((")
        for item in node.nodes:
            self.visit(item, frame)
            self.write(", ")
        self.write("))")


def _concat(parts: Iterable[Any]) -> Written:
    pieces: list[Any] = []
    count = 0
    for part in parts:
        piece = part if isinstance(part, str) else str(part)
        count += len(piece)
        _check_chars(count)
        pieces.append(piece)
    return _kept(joined(pieces))  # type: ignore[no-any-return]


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    code_generator_class = _Code
    concat = staticmethod(_concat)
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            # Folding would compute with plain strings, and "a" * 10**10 while it compiles.
            optimized=False,
            extensions=["jinja2.ext.loopcontrols", _Generation],
        )
        self._constants: dict[str, Written] = {}
        self.filters = {name: _bounded(filter_) for name, filter_ in self.filters.items()}
        self.filters["tojson"] = _to_json
        self.filters["join"] = _join
        self.globals["raise_exception"] = _refuse
        self.globals["strftime_now"] = _now
        self.globals["namespace"] = _Namespace
        del self.globals["lipsum"]

    def constant(self, text: str) -> Written:
        """A string that stands in the template."""
        found = self._constants.get(text)
        if found is None:
            found = self._constants[text] = own(text)
        return found

    def _generate(self, source: nodes.Template, *args: Any, **options: Any) -> str:
        for loop in source.find_all(nodes.For):
            tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
            statement = nodes.ExprStmt(tick).set_lineno(loop.lineno)
            loop.body.insert(0, statement.set_environment(self))
        return super()._generate(source, *args, **options)

    kept = staticmethod(_kept)

    @staticmethod
    def tick() -> None:
        """One turn of a loop."""
        _check_time()

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        _check_time()
        _check_growth(getattr(__obj, "__self__", None), getattr(__obj, "__name__", ""), args)
        return _kept(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _check_time()
        if operator == "**":
            if isinstance(left, int) and isinstance(right, int):
                _check_bits(left.bit_length() * max(right, 0))
        elif operator == "*":
            if isinstance(left, int) and isinstance(right, int):
                _check_bits(left.bit_length() + right.bit_length())
            for value, count in ((left, right), (right, left)):
                if isinstance(value, str) and isinstance(count, int):
                    _check_chars(len(value) * count)
                elif isinstance(value, (list, tuple)) and isinstance(count, int):
                    _check_items(len(value) * count)
        elif operator == "+":
            if isinstance(left, str) and isinstance(right, str):
                _check_chars(len(left) + len(right))
            elif isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
                _check_items(len(left) + len(right))
        elif isinstance(left, str):
            _check_form(left)
            # A short form may name a long value many times.
            _check_chars((left.count("%") + 1) * _text_length(right))
            if "*" in left:
                _check_arguments(right if isinstance(right, tuple) else (right,))
        return _kept(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        pattern = getattr(value, "__self__", None)
        if wrapped is None or isinstance(pattern, Markup):
            return wrapped
        assert isinstance(pattern, str)
        formatter: string.Formatter = jinja2.sandbox.SandboxedFormatter(self)
        takes_mapping = value.__name__ == "format_map"

        def written(*args: Any, **kwargs: Any) -> Written:
            if takes_mapping:
                args, kwargs = (), dict(*args)
            # A short pattern may name a long value many times.
            longest = max(map(_text_length, (*args, *kwargs.values())), default=0)
            _check_chars((pattern.count("{") + 1) * longest)
            return formatted(pattern, formatter, args, kwargs, _check_form)

        return written


class _Generation(Extension):
    """{% generation %} marks an answer for training; here it is as if it were not there."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own interface

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _check_bits(bits: int) -> None:
    if bits > _MAX_BITS:
        raise _BoundError(f"it computes a number of {bits:,} bits; the limit is {_MAX_BITS:,}")


def _text_length(value: Any) -> int:
    return len(value) if isinstance(value, str) else _weight(value, _Known())


def _check_growth(owner: Any, name: str, args: tuple[Any, ...]) -> None:
    """Refuse methods of Python's own types that make much out of little."""
    if not isinstance(owner, (str, bytes, bytearray, int, float, list, tuple, dict)):
        return
    _check_arguments(args)
    if not isinstance(owner, (str, bytes, bytearray)):
        return
    if name == "replace" and len(args) >= 2 and isinstance(args[0], type(owner).__mro__[-2]):
        _check_chars(_replaced_length(owner, args[0], args[1]))
    elif name == "join" and args and isinstance(args[0], (list, tuple)):
        _check_chars(sum(len(part) + len(owner) for part in args[0] if isinstance(part, str)))
    elif name in ("center", "ljust", "rjust", "zfill", "expandtabs"):
        tabs = 1 + (owner.count("\t") if isinstance(owner, str) else owner.count(b"\t"))
        _check_chars(tabs * max((arg for arg in args if isinstance(arg, int)), default=8))
    elif name in ("encode", "decode"):
        # Others take the square of a text's length.
        if any(str(one).lower() not in _PLAIN_CODECS for one in args[:1]):
            raise _BoundError(f"it asks for the encoding {str(args[0])[:40]!r}")
    elif name == "translate" and args and isinstance(args[0], Mapping):
        longest = max((len(new) for new in args[0].values() if isinstance(new, str)), default=1)
        _check_chars(len(owner) * max(longest, 1))
    elif name in ("split", "rsplit", "splitlines"):
        # Separators of one character at least; white space by the sign of it that is there.
        separators = (*args[:1],) if args and args[0] else " \t\n\r\v\f\x85\u2028\u2029"
        if isinstance(owner, str):
            _check_items(sum(owner.count(one) for one in separators if isinstance(one, str)))
        else:
            _check_items(len(owner))


def _replaced_length(text: Any, old: Any, new: Any) -> int:
    count = text.count(old) if old else len(text) + 1
    return len(text) + count * len(new)


def _bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, looking at the time, at its arguments, and at what it makes."""
    takes_first = hasattr(function, "jinja_pass_arg")

    def bounded(*args: Any, **kwargs: Any) -> Any:
        _check_time()
        given = args[1:] if takes_first else args
        _check_filtered(function.__name__, given, kwargs)
        result = function(*args, **kwargs)
        return _ticking(result) if isinstance(result, Iterator) else _kept(result)

    if takes_first:
        bounded.jinja_pass_arg = function.jinja_pass_arg  # type: ignore[attr-defined]
    return bounded


def _check_filtered(name: str, given: tuple[Any, ...], options: Mapping[str, Any]) -> None:
    """Refuse what a filter would take too long for, or make too much of."""
    value = given[0] if given else None
    others = (*given[1:], *options.values())
    if name in _TAKES_WIDTH:
        _check_arguments(others)
    if name in _LAYS_OUT:
        for one in (value, *others):
            if _text_length(one) > _MAX_LAID_OUT:
                raise _BoundError(f"it lays out a text of over {_MAX_LAID_OUT:,} characters")
    elif name == "do_sum":
        # Lists would be copied as often as there are of them.
        if any(isinstance(one, Collection) for one in (*given[2:], options.get("start"))):
            raise _BoundError("it adds up what is no number")
    elif name in ("do_list", "do_reverse") and isinstance(value, (str, range)):
        _check_items(len(value))
    elif name == "do_indent" and isinstance(value, str):
        width = max((_width(one) for one in others), default=4)
        _check_chars((len(value.splitlines()) + 1) * width + len(value))
    elif name == "do_replace" and isinstance(value, str):
        _check_growth(value, "replace", given[1:])
    elif name == "do_format" and isinstance(value, str):
        _check_form(value)
        _check_chars((value.count("%") + 1) * max(map(_text_length, others), default=0))


def _width(value: Any) -> int:
    return value if isinstance(value, int) else _text_length(value)


def _ticking(items: Iterator[Any]) -> Iterator[Any]:
    for item in items:
        _check_time()
        yield item


@jinja2.pass_environment
def _join(
    environment: jinja2.Environment,
    value: Iterable[Any],
    d: str = "",
    attribute: str | int | None = None,
) -> Written:
    """Jinja's filter, whose result forgets where its parts came from."""
    if attribute is not None:
        value = map(make_attrgetter(environment, attribute), value)
    pieces: list[Any] = []
    for part in value:
        pieces += [d, part] if pieces else [part]
        _check_items(len(pieces))
        _check_time()
    return _concat(pieces)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON, as chat templates expect it (Jinja's own filter escapes for HTML)."""
    if indent is not None and _width(indent) > _MAX_INDENT:
        raise _BoundError(f"it indents JSON by {_width(indent):,}; the limit is {_MAX_INDENT}")
    _check_chars(sum(map(_text_length, separators or ())) * _text_length(value))
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    if indent is None:
        text = encoder.encode(value)
    else:
        # Deep and long at once, blanks outweigh what is written.
        text = str.__str__(_concat(_ticking(iter(encoder.iterencode(value)))))
    _kept(text)
    return own(text) if isinstance(value, Written) and value.is_own else Written(text)


def _now(form: str) -> str:
    """The time in a format of strftime."""
    _check_form(form)
    _check_items(len(form))
    return datetime.datetime.now().strftime(form)


class _Namespace(Namespace):
    """Jinja's, which as text does not show what it holds: that may change after it was weighed."""

    def __repr__(self) -> str:
        return "<Namespace>"


def _refuse(message: object) -> NoReturn:
    raise TemplateRefusalError(str.__str__(str(message)))
