"""The engine in a process of its own: started, waited for, given a service.

What the server does, reading requests and framing answers, never waits for the engine's steps then,
nor they for it (decision 0128). This side needs no torch; `engine_child` is the other.
"""

import socket
import subprocess
import weakref
from pathlib import Path

from halfbyte import processes
from halfbyte.engine import wire
from halfbyte.engine.options import EngineConfig
from halfbyte.engine.service import EngineService
from halfbyte.errors import WorkerError
from halfbyte.log import logger

# How long the process may take to end once its connection is closed.
_END_S = 10.0


class EngineProcess:
    """A process that loads a checkpoint. Forgotten, or at our end, it ends."""

    def __init__(self, directory: Path, config: EngineConfig) -> None:
        """Start the process, which begins to load the checkpoint."""
        self._connection, theirs = wire.pair()
        with theirs:
            self._process = processes.start("halfbyte.server.ops.engine_child", [theirs.fileno()])
        self._end = weakref.finalize(self, _end, self._connection, self._process)
        wire.send(self._connection, wire.Load(directory, config, logger.getEffectiveLevel()))

    def close(self) -> None:
        """End the process at once, loaded or not."""
        self._process.kill()
        self._end()

    def service(self, *, max_requests: int) -> EngineService:
        """The engine as soon as it is loaded.

        Raises what loading it raises: CheckpointError, UsageError, CapacityError; WorkerError if
        the process has died of it.
        """
        try:
            report = wire.receive(self._connection)
        except EOFError:
            report = wire.Failed(processes.how_it_ended(self._process, _END_S))
        if isinstance(report, wire.Failed):
            self.close()
            raise report.error or WorkerError(f"the engine could not be loaded: {report.text}")
        assert isinstance(report, wire.Loaded), f"unexpected {report}"
        # The service holds this object by its method, and this object's end is the process's.
        return EngineService(self._connection, report, self._ended, max_requests=max_requests)

    def _ended(self) -> str:
        """Wait for the end of the process, whose connection is closed; say how it ended."""
        said = processes.how_it_ended(self._process, _END_S)
        self._end()
        return said


def _end(connection: socket.socket, process: "subprocess.Popen[bytes]") -> None:
    connection.close()
    processes.end(process, _END_S)
