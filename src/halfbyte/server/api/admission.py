"""Who is let in: answers in work, in all and by key, and requests for tokens alone."""

import contextlib
from collections.abc import Iterator

from halfbyte.errors import RequestError
from halfbyte.server.config import Limits
from halfbyte.server.ops.metrics import Metrics


class Admission:
    """Counts what is in work; refuses above the limits with 429, and all while draining."""

    def __init__(self, limits: Limits, metrics: Metrics) -> None:
        self._limits = limits
        self._metrics = metrics
        self._by_key: dict[str, int] = {}
        self._num_token_requests = 0
        self.is_draining = False

    @contextlib.contextmanager
    def admit(self, key: str, num_answers: int) -> Iterator[None]:
        """Hold room for some answers of one key while the body runs."""
        limits, metrics = self._limits, self._metrics
        if self.is_draining:
            raise RequestError("the server is shutting down", code="shutting_down", status=503)
        if metrics.running + num_answers > limits.queued_requests:
            message = f"the server has {metrics.running} answers in work or queued; try again later"
            raise RequestError(message, code="queue_full", status=429)
        held = self._by_key.get(key, 0)
        if held + num_answers > limits.requests_per_key:
            message = f"this key has {held} answers in work; {num_answers} more exceed its limit"
            raise RequestError(message, code="rate_limit_exceeded", status=429)
        metrics.running += num_answers
        self._by_key[key] = self._by_key.get(key, 0) + num_answers
        try:
            yield
        finally:
            metrics.running -= num_answers
            self._by_key[key] -= num_answers
            if not self._by_key[key]:
                del self._by_key[key]

    @contextlib.contextmanager
    def token_request(self) -> Iterator[None]:
        """Hold one place of /tokenize and /detokenize; RequestError (429) if none is free."""
        limit = self._limits.token_requests
        if self._num_token_requests >= limit:
            message = f"{limit} requests for tokens are in work, as many as may be; try again later"
            raise RequestError(message, code="queue_full", status=429)
        self._num_token_requests += 1
        try:
            yield
        finally:
            self._num_token_requests -= 1
