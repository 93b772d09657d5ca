"""One logger for the package: rank-0 filter and warnings that are said once.

Commands configure it (`configure`); libraries only call `logger`, `say_once`.
"""

import logging
import sys
from functools import cache

from halfbyte.printable import printable

logger = logging.getLogger("halfbyte")


class _Formatter(logging.Formatter):
    """Messages may quote what models, clients and files say; a terminal must not obey it."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def configure(*, level: str = "info", rank: int = 0) -> None:
    """Send log lines to stderr; ranks above 0 stay silent below warnings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.WARNING if rank > 0 else level.upper())


@cache
def say_once(message: str) -> None:
    """Log a warning the first time this exact message comes up in the process."""
    logger.warning(message)
