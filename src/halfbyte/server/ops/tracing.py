"""OpenTelemetry, if it is installed and asked for: one span a request, under its caller's trace.

Attribute names are those of OpenTelemetry's conventions for HTTP and for generative models.
"""

from typing import Any

from halfbyte.errors import UsageError, how_to_get
from halfbyte.server.call import Call

_FACTS = {
    "model": "gen_ai.request.model",
    "answer_id": "gen_ai.response.id",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
    "cached_tokens": "gen_ai.usage.cache_read.input_tokens",
    "finish_reasons": "gen_ai.response.finish_reasons",
    "first_token_ms": "halfbyte.first_token_ms",
}


class Tracing:
    """Makes spans. `provider` is a TracerProvider of the OpenTelemetry SDK."""

    def __init__(self, provider: Any) -> None:
        from opentelemetry.propagate import extract  # optional: the extra `otel`
        from opentelemetry.trace import SpanKind, Status, StatusCode

        self._provider = provider
        self._tracer = provider.get_tracer("halfbyte")
        self._extract, self._kind = extract, SpanKind.SERVER
        self._error = Status(StatusCode.ERROR)

    def begin(self, method: str, path: str, headers: dict[bytes, bytes]) -> Any:
        """A span that has begun; its parent is what the caller's traceparent header names."""
        carrier = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in headers.items()
        }
        return self._tracer.start_span(
            f"{method} {path}",
            context=self._extract(carrier),
            kind=self._kind,
            attributes={"http.request.method": method, "url.path": path},
        )

    def end(self, span: Any, route: str, status: int, call: Call) -> None:
        """End the span of a call and say what became of it."""
        span.set_attribute("http.route", route)
        span.set_attribute("http.response.status_code", status)
        span.set_attribute("halfbyte.request_id", call.request_id)
        for name, attribute in _FACTS.items():
            if call.facts.get(name) is not None:
                span.set_attribute(attribute, call.facts[name])
        if status >= 500:
            span.set_status(self._error)
        span.end()

    def close(self) -> None:
        """Send the spans that have not been sent yet."""
        self._provider.shutdown()


def open_tracing(endpoint: str) -> Tracing:
    """Spans to an OTLP endpoint over HTTP. UsageError without the packages."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise UsageError(
            f"--otlp-endpoint needs OpenTelemetry ({error.name} is missing); {how_to_get('otel')}"
        ) from error
    provider = TracerProvider(resource=Resource.create({"service.name": "halfbyte"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return Tracing(provider)
