"""A conversation in the terminal: streamed answers, dimmed thoughts, a few slash commands."""

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TextIO

from halfbyte.client.client import ChatClient, StreamedAnswer
from halfbyte.errors import UsageError
from halfbyte.printable import own_stream, printable

HELP = """\
  /new          forget the conversation       /again        answer the last question again
  /effort E     reasoning effort              /system TEXT  set the system prompt
  /temp T       temperature                   /quit         leave (Ctrl-D does it too)
  Ctrl-C stops an answer. A line that ends in \\ goes on in the next."""

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


@dataclass
class Terminal:
    """One conversation. `settings` are request fields that go along with every question.

    What model and server say is shown by `_say`, which leaves a terminal nothing to obey.
    """

    client: ChatClient
    model: str
    settings: dict[str, Any] = field(default_factory=dict)
    system: str | None = None
    out: TextIO = field(default_factory=lambda: own_stream(sys.stdout))
    turns: list[dict[str, Any]] = field(default_factory=list)

    def loop(self, read_line: Any = input) -> None:
        """Read questions and answer them until the end of input."""
        self._say(f"{self.model}. /help lists the commands.\n")
        while True:
            try:
                text = _read(read_line)
            except EOFError:
                self._write("\n")
                return
            except KeyboardInterrupt:
                self._write("\n")
                continue
            if text in ("/quit", "/exit"):
                return
            with self._complaints():
                if text.startswith("/"):
                    self._command(text)
                elif text:
                    self.ask(text)

    def ask(self, question: str, *, with_speed: bool = True) -> StreamedAnswer:
        """Ask, show the answer while it comes, and keep both; an error keeps neither."""
        self.turns.append({"role": "user", "content": question})
        try:
            return self._answer(with_speed)
        except UsageError:
            self.turns.pop()
            raise

    def _answer(self, with_speed: bool) -> StreamedAnswer:
        messages = [{"role": "system", "content": self.system}] if self.system else []
        body = {"model": self.model, "messages": [*messages, *self.turns], **self.settings}
        answer = StreamedAnswer()
        started = time.perf_counter()
        first_s = 0.0
        kind = "content"
        # An answer that is stopped stays in the conversation as far as it came.
        with contextlib.suppress(KeyboardInterrupt):
            for chunk in self.client.stream(body):
                new_kind, text = answer.add(chunk)
                if text:
                    first_s = first_s or time.perf_counter() - started
                    self._show(text, new_kind, kind)
                    kind = new_kind
        self._write((_PLAIN if self._has_colours and kind == "reasoning" else "") + "\n")
        if with_speed:
            self._show_speed(answer, first_s, time.perf_counter() - started)
        kept: dict[str, Any] = {"role": "assistant", "content": answer.content}
        if answer.reasoning:
            kept["reasoning_content"] = answer.reasoning
        if answer.content:
            self.turns.append(kept)
        return answer

    def _command(self, text: str) -> None:
        name, _, value = text.partition(" ")
        value = value.strip()
        if name == "/help":
            self._write(HELP + "\n")
        elif name == "/new":
            self.turns.clear()
        elif name == "/again":
            self._again()
        elif name == "/system":
            self.system = value or None
        elif name == "/effort":
            self.settings["reasoning_effort"] = value or None
        elif name == "/temp":
            try:
                self.settings["temperature"] = float(value)
            except ValueError as error:
                raise UsageError(f"{value!r} is not a number") from error
        else:
            raise UsageError(f"there is no command {name}; /help lists them")

    def _again(self) -> None:
        while self.turns and self.turns[-1]["role"] != "user":
            self.turns.pop()
        if not self.turns:
            raise UsageError("there is no question yet")
        self.ask(self.turns.pop()["content"])

    def _show(self, text: str, kind: str, before: str) -> None:
        if kind != before:
            self._write("" if not self._has_colours else _PLAIN if kind == "content" else _DIM)
            if before != "content" or kind == "call":
                self._write("\n")
        self._say(text)

    def _show_speed(self, answer: StreamedAnswer, first_s: float, total_s: float) -> None:
        count = answer.usage.get("completion_tokens", 0)
        if count < 2 or total_s <= first_s:
            return
        rate = (count - 1) / (total_s - first_s)
        line = f"[{count} tokens, first after {first_s:.2f} s, then {rate:.1f} a second]"
        self._write(f"{_DIM}{line}{_PLAIN}\n" if self._has_colours else f"{line}\n")

    @contextlib.contextmanager
    def _complaints(self) -> Iterator[None]:
        try:
            yield
        except UsageError as error:
            self._say(f"error: {error}\n")

    @property
    def _has_colours(self) -> bool:
        return self.out.isatty()

    def _say(self, text: str) -> None:
        self._write(printable(text))

    def _write(self, text: str) -> None:
        """Our own text and control sequences."""
        self.out.write(text)
        self.out.flush()


def _read(read_line: Any) -> str:
    lines = [str(read_line("> "))]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(str(read_line("  ")))
    return "\n".join(lines).strip()
