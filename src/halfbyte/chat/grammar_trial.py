"""A process in which every grammar is tried before the engine compiles it.

llguidance compiles what strangers write, and can be made to overflow its stack or to fill the
memory. So each grammar is first compiled in a process of its own, with a small stack, little memory
and little time; if that process dies, its request gets a 400 and nobody else notices. What passes
is compiled again where the engine runs (decision 0044).

The processes are forked ahead of need from one that never sees a grammar, so that an ordinary
schema waits for neither a start nor a fork. This side is `GrammarTrials`; `main` is the other.
"""

import contextlib
import ctypes
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, ClassVar

import llguidance

from halfbyte import processes
from halfbyte.chat.grammar_limits import GrammarLimits, build, fault, max_forced_length, sentence
from halfbyte.chat.schema import HeldSchema, MendedSchema, mended
from halfbyte.errors import RequestError
from halfbyte.machine import give_way

# Two at once: one that takes its time does not keep the others waiting.
_NUM_READY = 2
# What an ordinary grammar takes on a busy machine.
_ORDINARY_S = 0.05
# A start of the process: the vocabulary is read there. It counts against nobody's time.
_START_S = 60.0
# How a child ends when nobody asks any more.
_NOBODY_ASKS = 3


@dataclass(frozen=True, slots=True)
class Words:
    """A vocabulary as llguidance wants it: control tokens by unique names in angle brackets."""

    tokens: list[bytes]
    special_token_ids: list[int]
    bos_token_id: int | None
    eos_token_ids: list[int]


@dataclass(frozen=True, slots=True)
class Compile:
    """A message to the trial process: compile this one grammar."""

    lark: str
    is_free: bool


@dataclass(frozen=True, slots=True)
class Mend:
    """Asks what of some schemas cannot be held."""

    schemas: tuple[HeldSchema, ...]


@dataclass(frozen=True, slots=True)
class Tried:
    """A grammar that was compiled within the limits, or refused.

    num_bytes  what the compiled grammar takes
    warnings   what of a lenient schema it does not enforce
    has_died   the process went over its limits
    """

    fault: str | None
    num_bytes: int = 0
    warnings: tuple[str, ...] = ()
    has_died: bool = False


class GrammarTrials:
    """The server's side. Safe to use from several threads; started by the first call."""

    def __init__(self, words: Words, limits: GrammarLimits) -> None:
        self._setting = pickle.dumps((words, limits), pickle.HIGHEST_PROTOCOL)
        self._limits = limits
        self._lock = threading.Lock()
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._end: Callable[[], Any] = lambda: None
        self._waiting = threading.Lock()
        self._is_ready = False

    def start(self) -> None:
        """Start the process, if it is not there."""
        with self._lock:
            if self._process is not None and self._process.poll() is None:
                return
            self._end()
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                self._process = processes.start(
                    "halfbyte.chat.grammar_trial", [theirs.fileno()], setting=self._setting
                )
            self._control, self._is_ready = ours, False
            self._end = weakref.finalize(self, _end, ours, self._process)

    def wait(self) -> None:
        """Wait until grammars can be tried; RequestError (503) if that takes a minute."""
        for _ in range(3):
            self.start()
            with self._waiting:
                control = self._control
                assert control is not None
                if self._is_ready:
                    return
                try:
                    control.settimeout(_START_S)
                    # One message, when the vocabulary is read; nothing if the process has ended.
                    has_come = bool(control.recv(1))
                except TimeoutError:
                    break
                except OSError:
                    has_come = False
                if has_come and control is self._control:
                    self._is_ready = True
                    return
        raise _busy()

    def compile(self, lark: str, *, is_free: bool, timeout_s: float) -> Tried:
        """Whether a grammar can be compiled; a death of the process is a fault, too."""
        found = self._ask(Compile(lark, is_free), timeout_s)
        if found is None:
            limits = self._limits
            return Tried(
                f"it takes more than {limits.trial_bytes // 10**6} MB, {limits.trial_cpu_s:g} s or "
                f"{limits.trial_stack_bytes // 2**20} MB of stack to compile; make repetitions, "
                "chains of references and alternatives shorter",
                has_died=True,
            )
        assert isinstance(found, Tried)
        return found

    def mend(
        self, schemas: Sequence[HeldSchema], *, timeout_s: float
    ) -> tuple[MendedSchema, ...] | None:
        """What of each schema can be held; None if that is more than the limits allow to find."""
        found = self._ask(Mend(tuple(schemas)), timeout_s)
        assert found is None or isinstance(found, tuple)
        return found

    def _ask(self, question: Compile | Mend, timeout_s: float) -> Any:
        """The answer of a process of its own, or None if it has died of it or takes too long."""
        for _ in range(3):
            self.wait()
            try:
                return self._ask_once(question, time.monotonic() + timeout_s)
            except _NotBegunError:
                continue
        raise _busy()

    def _ask_once(self, question: Compile | Mend, deadline: float) -> Any:
        ours, theirs = socket.socketpair()
        with theirs, Connection(ours.detach()) as pipe:
            assert self._control is not None
            try:
                # Waits where more ask than a socket can hold.
                self._control.settimeout(max(0.01, deadline - time.monotonic()))
                socket.send_fds(self._control, [b"?"], [theirs.fileno()])
            except TimeoutError as error:
                raise _busy() from error
            except OSError as error:
                raise _NotBegunError from error
            theirs.close()
            has_begun = False
            try:
                pipe.send_bytes(pickle.dumps(question, pickle.HIGHEST_PROTOCOL))
                # First the process's id, once the question has been read, then the answer.
                if not pipe.poll(max(0.0, deadline - time.monotonic())):
                    return None
                process_id = int(pipe.recv_bytes())
                has_begun = True
                if not pipe.poll(_ORDINARY_S):
                    # Whatever takes longer gives way to those who answer.
                    with contextlib.suppress(OSError):
                        os.setpriority(os.PRIO_PROCESS, process_id, 10)
                    if not pipe.poll(max(0.0, deadline - time.monotonic())):
                        return None
                return pickle.loads(pipe.recv_bytes())
            except (EOFError, OSError) as error:
                if has_begun:
                    return None
                # Somebody else has ended it.
                raise _NotBegunError from error


class _NotBegunError(Exception):
    """A process went before it had read the question."""


def _busy() -> RequestError:
    return RequestError(
        "grammars cannot be tried just now; try again later",
        code="grammar_trials_busy",
        status=503,
    )


def _end(control: socket.socket, process: "subprocess.Popen[bytes]") -> None:
    """Let the process go: it leaves when its socket closes."""
    control.close()
    processes.end(process, 2.0)


# --- the other side -------------------------------------------------------------------------


def main() -> None:
    """Read the vocabulary, then keep a few processes ready; run by `GrammarTrials.start`."""
    # The server closes the socket.
    processes.ignore_signals()
    control = socket.socket(fileno=int(sys.argv[1]))
    words, limits = pickle.loads(sys.stdin.buffer.read())
    tokenizer = llguidance.LLTokenizer(
        llguidance.TokenizerWrapper(_Greedy(words)), eos_token=list(words.eos_token_ids)
    )
    # What is loaded lazily is loaded before the fork.
    build(tokenizer, 'start: %json {"type": "object"}\n', limits, is_free=False)
    used = _used_bytes()
    give_way()
    with contextlib.suppress(OSError):
        control.send(b"r")
    children: set[int] = set()
    while True:
        while len(children) < _NUM_READY:
            child = os.fork()
            if child == 0:
                _serve(control, tokenizer, limits, used)
            children.add(child)
        child, status = os.wait()
        children.discard(child)
        if os.waitstatus_to_exitcode(status) == _NOBODY_ASKS:
            # The others see the same.
            os._exit(0)


def _serve(
    control: socket.socket, tokenizer: Any, limits: GrammarLimits, used: Callable[[], int]
) -> None:
    """Answer one question, and leave. Nothing of this process is used twice."""
    status = 1
    try:
        message, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not message or not descriptors:
            os._exit(_NOBODY_ASKS)
        with Connection(descriptors[0]) as pipe:
            question = pickle.loads(pipe.recv_bytes())
            pipe.send_bytes(str(os.getpid()).encode())
            _confine(limits)
            if isinstance(question, Compile):
                answer: object = _compiled(question, tokenizer, limits, used)
            else:
                answer = _mended(question, tokenizer, limits)
            pipe.send_bytes(pickle.dumps(answer, pickle.HIGHEST_PROTOCOL))
        status = 0
    # Whatever it is, this process is its only victim.
    except BaseException:
        status = 1
    finally:
        os._exit(status)


def _confine(limits: GrammarLimits) -> None:
    """Limit what this process may use from here on, and keep its death quiet."""
    with open("/dev/null", "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    for kind, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_STACK, limits.trial_stack_bytes),
        (resource.RLIMIT_AS, _pages(0) + limits.trial_bytes),
    ):
        _, hard = resource.getrlimit(kind)
        within = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (within, within))
    # Its signal ends the process; a limit on processor time counts whole seconds only.
    signal.setitimer(signal.ITIMER_PROF, limits.trial_cpu_s)


def _pages(column: int) -> int:
    """Bytes of a figure of this process that the kernel counts in pages."""
    with open("/proc/self/statm") as figures:
        return int(figures.read().split()[column]) * resource.getpagesize()


def _compiled(
    question: Compile, tokenizer: Any, limits: GrammarLimits, used: Callable[[], int]
) -> Tried:
    before = used()
    matcher = build(tokenizer, question.lark, limits, is_free=question.is_free)
    num_bytes = max(0, used() - before)
    found = fault(matcher)
    if found is None and num_bytes > limits.max_bytes:
        found = (
            f"compiled it takes {num_bytes // 10**6} MB; the limit is {limits.max_bytes // 10**6} "
            "MB; make repetitions and alternatives shorter"
        )
    warnings = () if found else tuple(map(sentence, matcher.get_grammar_warnings()))
    return Tried(found, num_bytes + 2 * len(question.lark), warnings)


def _mended(question: Mend, tokenizer: Any, limits: GrammarLimits) -> tuple[MendedSchema, ...]:
    def fails(lark: str) -> str | None:
        return fault(build(tokenizer, lark, limits, is_free=False))

    return tuple(mended(schema, fails) for schema in question.schemas)


class _MallInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_: ClassVar = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    ]  # fmt: skip


def _used_bytes() -> Callable[[], int]:
    """Tells how many bytes are allocated; by the pages in memory where the C library cannot."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallinfo2"):
        return lambda: _pages(1)
    ask = library.mallinfo2
    ask.restype = _MallInfo

    def used() -> int:
        found = ask()
        return int(found.uordblks + found.hblkhd)

    return used


class _Greedy:
    """A tokenizer for llguidance that always takes the longest token; here any will do."""

    def __init__(self, words: Words) -> None:
        self.eos_token_id = words.eos_token_ids[0]
        self.bos_token_id = words.bos_token_id
        self.tokens = words.tokens
        self.special_token_ids = words.special_token_ids
        self._ids = {token: token_id for token_id, token in enumerate(words.tokens)}
        self._longest = max(map(len, words.tokens))
        self._max_length = max_forced_length(self._longest)

    def __call__(self, text: bytes | str) -> list[int]:
        data = (text.encode() if isinstance(text, str) else text)[: self._max_length]
        ids = []
        start = 0
        while start < len(data):
            for end in range(min(len(data), start + self._longest), start, -1):
                token_id = self._ids.get(data[start:end])
                if token_id is not None:
                    ids.append(token_id)
                    break
            else:
                end = start + 1
            start = end
        return ids
