"""What the engine's process does: load, then serve the other end of its socket. `engine_process`
starts it.
"""

import os
import socket
import sys
import traceback
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from halfbyte import log, processes
from halfbyte.chat.mask_plan import MaskMaker
from halfbyte.chat.tokens import load_chat
from halfbyte.engine import wire
from halfbyte.engine.core import Engine
from halfbyte.engine.host import Host
from halfbyte.errors import HalfbyteError
from halfbyte.machine import settle_heap

# A thread gives Python's lock up after so long, much sooner than by default: what arrives is read
# beside the steps.
_SWITCH_S = 0.00005


def main() -> None:
    """Run as the process that `engine_process` starts; the argument is the socket's descriptor."""
    # The server drains, and tells us.
    processes.ignore_signals()
    # Heaps of their own for threads, unlike the server's: a thread that compiles a grammar keeps a
    # heap's lock for tens of milliseconds while it moves a large table, and steps allocate, too.
    connection = socket.socket(fileno=int(sys.argv[1]))
    processes.leave_with_starter(connection.fileno())
    status = 1
    try:
        _serve(connection)
        status = 0
    except (EOFError, BrokenPipeError):
        status = 0  # the server has gone
    # Not by way of destructors: those of a GPU's libraries take their time.
    sys.stderr.flush()
    os._exit(status)


def _serve(connection: socket.socket) -> None:
    load = wire.receive(connection)
    assert isinstance(load, wire.Load), f"unexpected {load}"
    log.configure()
    log.logger.setLevel(load.log_level)
    try:
        # Both read files, one of them for seconds.
        with ThreadPoolExecutor(1) as beside:
            masks: Future[MaskMaker] = beside.submit(_load_masks, load.directory)
            engine = Engine.load(load.directory, load.config)
        host = Host(engine, connection, masks.result())
    except HalfbyteError as error:
        wire.send(connection, wire.Failed(str(error), error.with_traceback(None)))
        return
    except Exception as error:
        log.logger.error("%s", "".join(traceback.format_exception(error)))
        wire.send(connection, wire.Failed(f"{type(error).__name__}: {error}"))
        return
    settle_heap()
    sys.setswitchinterval(_SWITCH_S)
    loaded = wire.Loaded(
        engine.config, engine.max_model_len, engine.vocab_size, engine.facts(), engine.stats()
    )
    wire.send(connection, loaded)
    host.run()


def _load_masks(directory: Path) -> MaskMaker:
    chat = load_chat(directory)
    return MaskMaker(chat.vocabulary, chat.control)
