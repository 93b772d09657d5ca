"""One HTTP call as the server sees it: who asks, under which id, and what became of it."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from halfbyte.server.dialect import OPENAI, Dialect

# Enough to be read; what names a thousand fields is not helped by a thousand lines.
_MAX_WARNING_CHARS = 500


@dataclass(slots=True)
class Call:
    """What the server knows of one HTTP call; the gate makes it and hands it to the route.

    key         short name of the API key, for limits and the log
    headers     of the response; filled before its first byte
    facts       what became of it, for the access log and the trace: model, tokens, finish reasons,
                warnings
    path        as it was asked for
    user_agent  what the client calls itself
    dialect     the form of the answer
    """

    key: str = "anyone"
    request_id: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    path: str = ""
    user_agent: str = ""
    dialect: Dialect = OPENAI
    _warnings: list[str] = field(default_factory=list)

    def warn(self, warnings: Iterable[str]) -> None:
        """Tell the client, in a header, and the operator, in the log, what is not done as asked."""
        new = [one for one in warnings if one not in self._warnings]
        if not new:
            return
        self._warnings += new
        text = "; ".join(self._warnings).encode("ascii", "backslashreplace").decode()
        # Names of fields may be anything; a header's value neither begins nor ends with a blank.
        text = re.sub(r"[^\x20-\x7e]", " ", text)[:_MAX_WARNING_CHARS].strip()
        self.headers["x-halfbyte-warning"] = text
        self.facts["warnings"] = text
