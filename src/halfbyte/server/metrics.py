"""Counters and histograms of one server, written as Prometheus text.

Names begin with `halfbyte_`. With the vLLM option the figures that its dashboards read are written
once more under `vllm:` names.
"""

import bisect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_TOKENS = (1, 8, 32, 128, 512, 2048, 8192, 32768, 131072, 262144)


@dataclass(slots=True)
class Histogram:
    """Counts of observations up to each bound, their number and sum."""

    bounds: tuple[float, ...]
    counts: list[int] = field(init=False)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value

    def lines(self, name: str, labels: str = "") -> Iterator[str]:
        """Prometheus lines, cumulative as the format wants."""
        running = 0
        comma = f",{labels}" if labels else ""
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            running += count
            text = "+Inf" if bound == float("inf") else f"{bound:g}"
            yield f'{name}_bucket{{le="{text}"{comma}}} {running}'
        braces = f"{{{labels}}}" if labels else ""
        yield f"{name}_sum{braces} {self.total!r}"
        yield f"{name}_count{braces} {running}"


class Metrics:
    """What one server has done since it started. Touched on the event loop only."""

    def __init__(self) -> None:
        self.http_requests: dict[tuple[str, int], int] = {}
        self.finished: dict[str, int] = {}
        self.prompt_tokens = 0
        self.cached_prompt_tokens = 0
        self.completion_tokens = 0
        self.reasoning_tokens = 0
        self.disconnects = 0
        self.running = 0
        self.request_seconds = Histogram(_SECONDS)
        self.first_token_seconds = Histogram(_SECONDS)
        self.token_seconds = Histogram(_SECONDS)
        self.prompt_size_tokens = Histogram(_TOKENS)
        self.answer_size_tokens = Histogram(_TOKENS)

    def count_http(self, route: str, status: int) -> None:
        """One HTTP response."""
        key = (route, status)
        self.http_requests[key] = self.http_requests.get(key, 0) + 1

    def count_finish(self, reason: str) -> None:
        """One answer ended."""
        self.finished[reason] = self.finished.get(reason, 0) + 1

    def text(
        self,
        engine: Mapping[str, float],
        process: Mapping[str, float],
        model: str,
        *,
        vllm_names: bool = False,
    ) -> str:
        """The whole page. `engine` and `process` hold gauges by name."""
        lines = list(self._own_lines())
        for name, value in process.items():
            lines += _metric(f"halfbyte_process_{name}", "gauge", f"Process: {name}.", value)
        for name, value in engine.items():
            lines += _metric(f"halfbyte_engine_{name}", "gauge", f"Engine: {name}.", value)
        if vllm_names:
            lines += self._vllm_lines(engine, model)
        return "\n".join(lines) + "\n"

    def _own_lines(self) -> Iterator[str]:
        yield from _head("halfbyte_http_requests_total", "counter", "HTTP responses.")
        for (route, status), count in sorted(self.http_requests.items()):
            yield f'halfbyte_http_requests_total{{route="{route}",status="{status}"}} {count}'
        yield from _head("halfbyte_answers_total", "counter", "Answers by how they ended.")
        for reason, count in sorted(self.finished.items()):
            yield f'halfbyte_answers_total{{reason="{reason}"}} {count}'
        counters = (
            ("prompt_tokens", "Tokens of prompts.", self.prompt_tokens),
            ("cached_prompt_tokens", "Prompt tokens from the cache.", self.cached_prompt_tokens),
            ("completion_tokens", "Generated tokens.", self.completion_tokens),
            ("reasoning_tokens", "Generated tokens inside thoughts.", self.reasoning_tokens),
            ("disconnects", "Requests that the client left.", self.disconnects),
        )
        for name, what, value in counters:
            yield from _metric(f"halfbyte_{name}_total", "counter", what, value)
        yield from _metric("halfbyte_answers_running", "gauge", "Admitted answers.", self.running)
        for name, what, histogram in self._histograms():
            yield from _head(f"halfbyte_{name}", "histogram", what)
            yield from histogram.lines(f"halfbyte_{name}")

    def _histograms(self) -> tuple[tuple[str, str, Histogram], ...]:
        return (
            ("request_seconds", "From admission to the end of an answer.", self.request_seconds),
            ("first_token_seconds", "From admission to the first token.", self.first_token_seconds),
            ("token_seconds", "Between events of a running answer.", self.token_seconds),
            ("prompt_size_tokens", "Tokens of a prompt.", self.prompt_size_tokens),
            ("answer_size_tokens", "Tokens of an answer.", self.answer_size_tokens),
        )

    def _vllm_lines(self, engine: Mapping[str, float], model: str) -> Iterator[str]:
        label = f'model_name="{model}"'
        total = engine.get("total_blocks", 0)
        used = (total - engine.get("free_blocks", 0)) / total if total else 0.0
        gauges = (
            ("num_requests_running", engine.get("running", 0)),
            ("num_requests_waiting", engine.get("waiting", 0)),
            ("kv_cache_usage_perc", used),
        )
        for name, value in gauges:
            yield from _head(f"vllm:{name}", "gauge", f"As vLLM's {name}.")
            yield f"vllm:{name}{{{label}}} {value}"
        counters = (
            ("prompt_tokens_total", self.prompt_tokens),
            ("generation_tokens_total", self.completion_tokens),
            ("prefix_cache_queries_total", self.prompt_tokens),
            ("prefix_cache_hits_total", self.cached_prompt_tokens),
            ("spec_decode_num_draft_tokens_total", engine.get("proposed_tokens", 0)),
            ("spec_decode_num_accepted_tokens_total", engine.get("accepted_tokens", 0)),
        )
        for name, value in counters:
            yield from _head(f"vllm:{name}", "counter", f"As vLLM's {name}.")
            yield f"vllm:{name}{{{label}}} {value}"
        yield from _head("vllm:request_success_total", "counter", "As vLLM's request_success.")
        for reason, count in sorted(self.finished.items()):
            yield f'vllm:request_success_total{{{label},finished_reason="{reason}"}} {count}'
        histograms = (
            ("time_to_first_token_seconds", self.first_token_seconds),
            ("inter_token_latency_seconds", self.token_seconds),
            ("e2e_request_latency_seconds", self.request_seconds),
            ("request_prompt_tokens", self.prompt_size_tokens),
            ("request_generation_tokens", self.answer_size_tokens),
        )
        for name, histogram in histograms:
            yield from _head(f"vllm:{name}", "histogram", f"As vLLM's {name}.")
            yield from histogram.lines(f"vllm:{name}", label)


def _head(name: str, kind: str, what: str) -> Iterator[str]:
    yield f"# HELP {name} {what}"
    yield f"# TYPE {name} {kind}"


def _metric(name: str, kind: str, what: str, value: float) -> Iterator[str]:
    yield from _head(name, kind, what)
    yield f"{name} {value}"
