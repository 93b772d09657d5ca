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
import string
import time
from collections.abc import Callable, Iterable, Mapping
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

from halfbyte.chat import sandbox_bounds
from halfbyte.chat.sandbox_bounds import (
    MAX_INDENT,
    BoundError,
    asked_width,
    bounded_call,
    check_arguments,
    check_bits,
    check_chars,
    check_form,
    check_growth,
    check_items,
    check_time,
    kept_value,
    running_bounds,
    text_length,
    ticking,
    weight_of,
)
from halfbyte.chat.written import Written, formatted, joined, own
from halfbyte.errors import CheckpointError, RequestError

# What a template may write: so much of its own, and so often what it was given. Encoding takes a
# hundred bytes for each character.
MAX_OWN_CHARS, MAX_TIMES_WRITTEN = 2**20, 16
MAX_SOURCE = 2**18  # characters of a template; the longest in use have 30,000


class TemplateRefusalError(Exception):
    """Raised where a chat template refuses a conversation by `raise_exception`."""


class ChatTemplate:
    """A chat template, compiled once and rendered within bounds."""

    def __init__(self, source: str, where: str) -> None:
        """Compile the template; CheckpointError naming `where` if that fails."""
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
        """Render a conversation; RequestError in the template's words where it refuses or fails."""
        running_bounds.ends = time.thread_time() + sandbox_bounds.MAX_SECONDS
        running_bounds.made, running_bounds.known = 0, {}
        try:
            # What the conversation holds is weighed once, however often it is passed on.
            given = sum(
                weight_of(value, running_bounds.known, most=None) for value in values.values()
            )
            text = self._template.render(values)
            if len(text) > MAX_OWN_CHARS + MAX_TIMES_WRITTEN * given:
                raise BoundError(f"it writes {len(text):,} characters out of {given:,}")
        except TemplateRefusalError as error:
            raise RequestError(str(error), param="messages") from error
        # A template is foreign code: whatever it raises is its fault or the conversation's.
        except Exception as error:
            said = _first_line(error) or type(error).__name__
            message = f"the model's chat template cannot render this conversation: {said}"
            raise RequestError(message, param="messages") from error
        finally:
            running_bounds.ends = None
            running_bounds.known = {}
        assert isinstance(text, Written)
        return text


def _first_line(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested, or calls itself, too deeply"
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
        check_chars(count)
        pieces.append(piece)
    return kept_value(joined(pieces))  # type: ignore[no-any-return]


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
        self.filters = {name: bounded_call(filter_) for name, filter_ in self.filters.items()}
        self.filters["tojson"] = _to_json
        self.filters["join"] = _join
        self.globals["raise_exception"] = _refuse
        self.globals["strftime_now"] = _now
        self.globals["namespace"] = _Namespace
        del self.globals["lipsum"]

    def constant(self, text: str) -> Written:
        """Mark a string that stands in the template as written by the template."""
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

    kept = staticmethod(kept_value)

    @staticmethod
    def tick() -> None:
        """Count one turn of a loop of the template against its bounds."""
        check_time()

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        check_time()
        check_growth(getattr(__obj, "__self__", None), getattr(__obj, "__name__", ""), args)
        return kept_value(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        check_time()
        if operator == "**":
            if isinstance(left, int) and isinstance(right, int):
                check_bits(left.bit_length() * max(right, 0))
        elif operator == "*":
            if isinstance(left, int) and isinstance(right, int):
                check_bits(left.bit_length() + right.bit_length())
            for value, count in ((left, right), (right, left)):
                if isinstance(value, str) and isinstance(count, int):
                    check_chars(len(value) * count)
                elif isinstance(value, (list, tuple)) and isinstance(count, int):
                    check_items(len(value) * count)
        elif operator == "+":
            if isinstance(left, str) and isinstance(right, str):
                check_chars(len(left) + len(right))
            elif isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
                check_items(len(left) + len(right))
        elif isinstance(left, str):
            check_form(left)
            # A short form may name a long value many times.
            check_chars((left.count("%") + 1) * text_length(right))
            if "*" in left:
                check_arguments(right if isinstance(right, tuple) else (right,))
        return kept_value(super().call_binop(context, operator, left, right))

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
            longest = max(map(text_length, (*args, *kwargs.values())), default=0)
            check_chars((pattern.count("{") + 1) * longest)
            return formatted(pattern, formatter, args, kwargs, check_form)

        return written


class _Generation(Extension):
    """{% generation %} marks an answer for training; here it is as if it were not there."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own interface

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


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
        check_items(len(pieces))
        check_time()
    return _concat(pieces)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON, as chat templates expect it (Jinja's own filter escapes for HTML)."""
    if indent is not None and asked_width(indent) > MAX_INDENT:
        raise BoundError(f"it indents JSON by {asked_width(indent):,}; the limit is {MAX_INDENT}")
    check_chars(sum(map(text_length, separators or ())) * text_length(value))
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    if indent is None:
        text = encoder.encode(value)
    else:
        # Deep and long at once, blanks outweigh what is written.
        text = str.__str__(_concat(ticking(iter(encoder.iterencode(value)))))
    kept_value(text)
    return own(text) if isinstance(value, Written) and value.is_own else Written(text)


def _now(form: str) -> str:
    """The time in a format of strftime."""
    check_form(form)
    check_items(len(form))
    return datetime.datetime.now().strftime(form)


class _Namespace(Namespace):
    """Jinja's, which as text does not show what it holds: that may change after it was weighed."""

    def __repr__(self) -> str:
        return "<Namespace>"


def _refuse(message: object = "the chat template refuses this conversation") -> NoReturn:
    raise TemplateRefusalError(str.__str__(str(message)))
