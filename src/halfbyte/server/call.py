"""One HTTP call as the server sees it: who asks, under which id, and what became of it."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Call:
    """Made by the gate, handed down to whoever answers.

    key         short name of the API key, for limits and the log
    headers     of the response; filled before its first byte
    facts       what became of it, for the access log and the trace: model, tokens, finish reasons
    """

    key: str = "anyone"
    request_id: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
