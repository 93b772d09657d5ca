"""What every route needs, in one place: engine, chat format, limits, counters, admission."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from halfbyte.chat.grammar import GrammarCompiler
from halfbyte.chat.grammar_limits import GrammarLimits
from halfbyte.chat.prompt import banned_control_ids, banned_in_text
from halfbyte.chat.tokens import ChatFormat
from halfbyte.errors import RequestError
from halfbyte.server.api import wire
from halfbyte.server.api.aside import Aside
from halfbyte.server.api.pieces import Piece
from halfbyte.server.api.reader import Reader
from halfbyte.server.api.stream import BodyRoom
from halfbyte.server.call import Call
from halfbyte.server.config import ServerConfig
from halfbyte.server.ops import process_figures as process
from halfbyte.server.ops.metrics import Metrics
from halfbyte.server.ops.supervise import Supervisor


class Admission:
    """Counts admitted answers, in all and by key; refuses above the limits with 429."""

    def __init__(self, config: ServerConfig, metrics: Metrics) -> None:
        self._limits = config.limits
        self._metrics = metrics
        self._by_key: dict[str, int] = {}
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


@dataclass(frozen=True, slots=True)
class Running:
    """A job in work: whose it is, since when (monotonic), its figures, its ids in the engine."""

    call: Call
    started_s: float
    facts: Callable[[], dict[str, Any]]
    engine_ids: tuple[str, ...]


class Upstream(Protocol):
    """Another server that makes the answers of this one's checked requests; jobs are filled in."""

    def chat(
        self, request: wire.ChatRequest, messages: list[dict[str, Any]], job: Any
    ) -> AsyncGenerator[list[Piece], None]:
        """Pieces of the answer to a conversation; each list is one event of the stream."""

    def text(self, request: wire.CompletionRequest, job: Any) -> AsyncGenerator[list[Piece], None]:
        """Pieces of the continuations of plain prompts; each list is one event of the stream."""


class Backend:
    """One server's parts. Immutable but for its counters."""

    def __init__(
        self,
        service: Supervisor,
        chat: ChatFormat,
        config: ServerConfig,
        upstream: Upstream | None = None,
    ) -> None:
        self.service = service
        self.chat = chat
        self.config = config
        self.upstream = upstream
        self.metrics = Metrics()
        self.running: dict[str, Running] = {}
        # One picture is decoded at a time: the largest take 300 MB until they are scaled.
        self.decoding = asyncio.Lock()
        self.admission = Admission(config, self.metrics)
        limits = config.limits
        self.reader = Reader(chat, config)
        self.aside = Aside(self.reader, chat.directory, config)
        self.body_room = BodyRoom(4 * limits.body_bytes)
        self._num_token_requests = 0
        self.compiler = GrammarCompiler(
            chat.vocabulary,
            GrammarLimits(max_source_bytes=limits.schema_bytes, max_depth=limits.schema_depth),
        )
        padding = tuple(range(chat.vocabulary.size, config.vocab_size))
        self._banned_in_text = banned_in_text(chat.vocabulary, chat.image_layout, config.vocab_size)
        self._banned = {
            (thinking, tools): padding
            + banned_control_ids(chat.vocabulary, chat.control, thinking=thinking, tools=tools)
            for thinking in (False, True)
            for tools in (False, True)
        }

    @contextlib.contextmanager
    def token_request(self) -> Iterator[None]:
        """Hold one place of /tokenize and /detokenize; RequestError (429) if none is free."""
        limit = self.config.limits.token_requests
        if self._num_token_requests >= limit:
            message = f"{limit} requests for tokens are in work, as many as may be; try again later"
            raise RequestError(message, code="queue_full", status=429)
        self._num_token_requests += 1
        try:
            yield
        finally:
            self._num_token_requests -= 1

    def banned_in_chat(self, *, thinking: bool, tools: bool) -> tuple[int, ...]:
        """Token ids that an answer of a conversation may not contain."""
        return self._banned[thinking, tools]

    def banned_in_text(self) -> tuple[int, ...]:
        """Token ids that a plain continuation may not contain."""
        return self._banned_in_text

    def check_model(self, name: str | None) -> None:
        """Raise RequestError (404) for a model that this server does not serve."""
        if name is not None and name not in self.config.model_names:
            known = ", ".join(self.config.model_names)
            raise RequestError(
                f"the model {name!r} does not exist; this server has: {known}",
                param="model",
                code="model_not_found",
                status=404,
            )

    @property
    def is_ready(self) -> bool:
        """Whether new requests are taken: the engine runs and the server is not ending."""
        return self.service.is_ready and not self.admission.is_draining

    def metrics_text(self) -> str:
        """The page of /metrics in Prometheus text: server, process and engine."""
        engine = {**self.engine_figures(), "alive": int(self.service.is_ready)}
        return self.metrics.text(
            engine,
            process.figures(),
            self.config.model_names[0],
            vllm_names=self.config.vllm_metric_names,
        )

    def engine_figures(self) -> dict[str, float]:
        """The engine's numeric figures by name; empty while there is no engine."""
        stats = self.service.stats()
        if not dataclasses.is_dataclass(stats):
            return {}
        values = {field.name: getattr(stats, field.name) for field in dataclasses.fields(stats)}
        return {
            name: value
            for name, value in values.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
