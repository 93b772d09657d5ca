"""The engine's side of the wire: one thread that runs steps, one that listens.

Commands are read as they come and executed between steps. What need not wait for the engine is done
where they are read: requests are checked, masks are made. Grammars that must be compiled for one
have a thread of their own, behind which neither other requests nor the end of this one wait.

`service` is the other side. Usually this runs in a process of its own; tests run it in a thread.
"""

import queue
import socket
import sys
import threading
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from halfbyte.engine import wire
from halfbyte.engine.core import Engine
from halfbyte.engine.request import Event, FinishEvent, GenerationRequest, ImageInput, TokenMask
from halfbyte.engine.service import EngineService
from halfbyte.errors import RequestError
from halfbyte.log import logger

# How often an engine without work is asked whether its other ranks live.
_WATCH_S = 0.25


class Mask(TokenMask, Protocol):
    """A mask that can say why it could not be followed."""

    @property
    def problem(self) -> str | None:
        """Why it could not be followed to its end; None if it could."""


class Masks(Protocol):
    """Makes masks of what requests bring as `rules`. Called from several threads."""

    def is_quick(self, rules: Any) -> bool:
        """Whether a mask of these rules can be made at once."""

    def make(self, rules: Any) -> Mask:
        """A fresh mask. Raises RequestError if the request cannot run."""


class Host:
    """Runs one engine for the other end of a socket."""

    def __init__(
        self, engine: Engine, connection: socket.socket, masks: Masks | None = None
    ) -> None:
        """`masks` is needed for requests with rules only."""
        self._engine = engine
        self._connection = connection
        self._masks = masks
        self._sending = threading.Lock()
        self._commands: queue.SimpleQueue[wire.Command] = queue.SimpleQueue()
        # Of running requests.
        self._held: dict[str, Mask] = {}
        self._pixels: dict[bytes, NDArray[np.uint8]] = {}
        self._maker: ThreadPoolExecutor | None = None
        # Requests whose masks are being made, and those among them that were aborted meanwhile.
        self._making: set[str] = set()
        self._unwanted: set[str] = set()
        self._books = threading.Lock()

    def run(self) -> None:
        """Run steps until told to stop, or until the other side has gone."""
        threading.Thread(target=self._listen, name="engine-commands", daemon=True).start()
        try:
            while self._obey():
                if self._engine.has_work():
                    self._report(self._engine.step())
        except (BrokenPipeError, ConnectionResetError):
            logger.debug("nobody is there for the engine's events")
        # Whatever it is, it must be seen by those who wait, not only in a log: an exit called
        # for by a library and a panic of foreign code are no Exception.
        except BaseException as error:
            logger.exception("the engine has failed")
            text = str(self._engine.failure or f"{type(error).__name__}: {error}")
            self._die(f"the engine has failed: {text}")
        finally:
            self._engine.close()
            if self._maker is not None:
                self._maker.shutdown(wait=False, cancel_futures=True)
            wire.hang_up(self._connection)

    def _obey(self) -> bool:
        """Execute the commands that have arrived, waiting for one if idle; False to end."""
        engine = self._engine
        has_changed = False
        while True:
            try:
                if engine.has_work():
                    command = self._commands.get_nowait()
                else:
                    if has_changed:
                        self._report([])
                        has_changed = False
                    command = self._commands.get(timeout=_WATCH_S)
            except queue.Empty:
                if engine.has_work():
                    return True
                if engine.failure is not None:
                    self._die(engine.failure)
                    return False
                continue
            has_changed = True
            if isinstance(command, wire.Add):
                engine.add(command.request, is_validated=True)
            elif isinstance(command, wire.Abort):
                finish = engine.abort(command.request_id)
                self._report([] if finish is None else [finish])
            elif isinstance(command, wire.ClearPrefixCache):
                engine.clear_prefix_cache()
            else:
                assert isinstance(command, wire.Stop), f"unexpected {command}"
                ended = [engine.abort(request_id) for request_id in engine.request_ids()]
                self._report([finish for finish in ended if finish is not None])
                return False

    def _report(self, events: Sequence[Event]) -> None:
        told = [self._told(event) if isinstance(event, FinishEvent) else event for event in events]
        self._send(wire.Stepped(tuple(told), self._engine.stats()))

    def _told(self, finish: FinishEvent) -> FinishEvent:
        mask = self._held.pop(finish.request_id, None)
        return finish if mask is None else replace(finish, mask_problem=mask.problem)

    def _send(self, report: wire.Report) -> None:
        with self._sending:
            wire.send(self._connection, report)

    def _die(self, text: str) -> None:
        try:
            self._send(wire.Died(text))
        except OSError:
            logger.debug("nobody is there to be told")

    # What follows runs on the listening thread, or on the one that makes masks.

    def _listen(self) -> None:
        try:
            while True:
                command = wire.receive(self._connection)
                if isinstance(command, wire.Keep):
                    self._pixels[command.digest] = command.pixels
                elif isinstance(command, wire.Forget):
                    for digest in command.digests:
                        del self._pixels[digest]
                elif isinstance(command, wire.TellStacks):
                    self._send(wire.Stacks(_stacks()))
                elif isinstance(command, wire.Add):
                    self._take(command)
                else:
                    if isinstance(command, wire.Abort):
                        self._unwant(command.request_id)
                    known = wire.Abort | wire.ClearPrefixCache | wire.Stop
                    assert isinstance(command, known), f"unexpected {command}"
                    self._commands.put(command)
        except (EOFError, OSError):
            # The other side has gone, or this one has ended.
            self._commands.put(wire.Stop())

    def _take(self, command: wire.Add) -> None:
        images = tuple(
            ImageInput(self._pixels[one.digest], one.offset, one.num_tokens, one.digest)
            for one in command.pictures
        )
        request = replace(command.request, images=images)
        try:
            self._engine.validate(request)
            rules = request.rules
            if rules is None:
                self._commands.put(wire.Add(request))
                return
            assert self._masks is not None, "this engine makes no masks"
            if self._masks.is_quick(rules):
                self._commands.put(wire.Add(self._masked(request)))
                return
        except RequestError as error:
            self._send(wire.Refused(request.request_id, error.with_traceback(None)))
            return
        if self._maker is None:
            self._maker = ThreadPoolExecutor(1, thread_name_prefix="masks-to-come")
        with self._books:
            self._making.add(request.request_id)
        self._maker.submit(self._make, request)

    def _masked(self, request: GenerationRequest) -> GenerationRequest:
        assert self._masks is not None
        mask = self._masks.make(request.rules)
        self._held[request.request_id] = mask
        return replace(request, mask=mask, rules=None)

    def _unwant(self, request_id: str) -> None:
        with self._books:
            if request_id in self._making:
                self._unwanted.add(request_id)

    def _make(self, request: GenerationRequest) -> None:
        request_id = request.request_id
        error: RequestError | None = None
        try:
            request = self._masked(request)
        except RequestError as raised:
            error = raised.with_traceback(None)
        # Foreign code again: it costs this request and no other.
        except BaseException as raised:
            logger.exception("the mask of request %s could not be made", request_id)
            error = RequestError(f"the token mask failed: {raised}", code="mask_failed", status=500)
        with self._books:
            self._making.discard(request_id)
            is_unwanted = request_id in self._unwanted
            self._unwanted.discard(request_id)
            if not is_unwanted and error is None:
                self._commands.put(wire.Add(request))
        if is_unwanted:
            self._held.pop(request_id, None)
            num_prompt = len(request.prompt_token_ids)
            finish = FinishEvent(request_id, "abort", None, num_prompt, 0, 0)
            self._send(wire.Stepped((finish,), self._engine.stats()))
        elif error is not None:
            self._send(wire.Refused(request_id, error))


def _stacks() -> str:
    """Where every thread of this process is."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident, frame in sys._current_frames().items():
        lines = "".join(traceback.format_stack(frame))
        parts.append(f"engine thread {names.get(ident, ident)}\n{lines}")
    return "\n".join(parts)


def in_thread(
    engine: Engine, masks: Masks | None = None, *, max_requests: int = 1024
) -> EngineService:
    """An engine of this process behind the same wire, for who made it: tests, benchmarks."""
    ours, theirs = wire.pair()
    host = threading.Thread(
        target=Host(engine, theirs, masks).run, name="halfbyte-engine", daemon=True
    )
    loaded = wire.Loaded(
        engine.config, engine.max_model_len, engine.vocab_size, engine.facts(), engine.stats()
    )

    def end() -> str:
        host.join()
        return "its thread has ended"

    host.start()
    return EngineService(ours, loaded, end, max_requests=max_requests)
