"""Counters and histograms of one server, written as Prometheus text.

Names begin with `halfbyte_` and follow Prometheus' naming rules: base units, `_total` on what only
grows (https://prometheus.io/docs/practices/naming/). With the vLLM option the figures that its
dashboards read are written once more under `vllm:` names.
"""

import bisect
import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

import halfbyte

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
        """Count one value in the first bucket that holds it."""
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        """Each bound with the number of values up to it, as Prometheus wants them."""
        running, found = 0, []
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            running += count
            found.append(("+Inf" if bound == float("inf") else f"{bound:g}", float(running)))
        return found


class _Shown(NamedTuple):
    """How a figure of the engine or the process is published."""

    name: str
    kind: Literal["gauge", "counter"]
    what: str


# Keyed by the fields of `engine.core.EngineStats`; counters start again with the engine.
ENGINE_FIGURES = {
    "alive": _Shown("alive", "gauge", "1 while the engine takes requests, 0 otherwise."),
    "running": _Shown("running", "gauge", "Answers that are being generated."),
    "waiting": _Shown("waiting", "gauge", "Answers that wait for room in the KV cache."),
    "total_blocks": _Shown("total_blocks", "gauge", "Blocks that the KV cache has."),
    "free_blocks": _Shown(
        "free_blocks", "gauge", "Blocks of the KV cache that no running answer holds."
    ),
    "cached_blocks": _Shown(
        "cached_blocks", "gauge", "Free blocks whose content a later prompt can find again."
    ),
    "block_tokens": _Shown("block_tokens", "gauge", "Tokens that one block of the KV cache holds."),
    "weight_bytes": _Shown("weight_bytes", "gauge", "Bytes of the weights in memory."),
    "cache_bytes": _Shown("cache_bytes", "gauge", "Bytes of the KV cache in memory."),
    "requests": _Shown("requests", "counter", "Requests given to the engine."),
    "steps": _Shown("steps", "counter", "Steps that the engine has run."),
    "step_s": _Shown("step_seconds", "counter", "Seconds that the engine has spent in steps."),
    "preemptions": _Shown(
        "preemptions", "counter", "Answers set back because the KV cache had no room for them."
    ),
    "prompt_tokens": _Shown("prompt_tokens", "counter", "Prompt tokens given to the engine."),
    "cached_tokens": _Shown(
        "cached_tokens", "counter", "Prompt tokens whose keys and values were found in the cache."
    ),
    "generated_tokens": _Shown("generated_tokens", "counter", "Tokens that the engine generated."),
    "proposed_tokens": _Shown(
        "proposed_tokens", "counter", "Tokens guessed by speculation and checked by the model."
    ),
    "accepted_tokens": _Shown(
        "accepted_tokens", "counter", "Guessed tokens that the model agreed with."
    ),
}
PROCESS_FIGURES = {
    "threads": _Shown("threads", "gauge", "Threads of the process outside bounded pools."),
    "pool_threads": _Shown("pool_threads", "gauge", "Workers of the process's bounded pools."),
    "tasks": _Shown("tasks", "gauge", "Tasks of the event loop that are not finished."),
    "resident_bytes": _Shown(
        "resident_bytes", "gauge", "Bytes of memory that the server and its processes occupy."
    ),
    "open_files": _Shown("open_files", "gauge", "File descriptors the process holds open."),
}


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
        """Count one HTTP response by route and status."""
        key = (route, status)
        self.http_requests[key] = self.http_requests.get(key, 0) + 1

    def count_finish(self, reason: str) -> None:
        """Count one answer that ended, by its reason."""
        self.finished[reason] = self.finished.get(reason, 0) + 1

    def text(
        self,
        engine: Mapping[str, float],
        process: Mapping[str, float],
        model: str,
        *,
        vllm_names: bool = False,
    ) -> str:
        """The whole page. `engine` and `process` hold figures by name, model the served name."""
        families = [
            _build_info(model),
            *self._own(),
            *_figures("halfbyte_process_", process, PROCESS_FIGURES),
            *_figures("halfbyte_engine_", engine, ENGINE_FIGURES),
            *(self._vllm(engine, model) if vllm_names else ()),
        ]
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Families(families))
        return generate_latest(registry).decode()

    def _own(self) -> Iterator[Metric]:
        yield _counter(
            "halfbyte_http_requests",
            "HTTP responses by route and status.",
            {(route, str(status)): n for (route, status), n in sorted(self.http_requests.items())},
            ("route", "status"),
        )
        yield _counter(
            "halfbyte_answers",
            "Answers by how they ended.",
            {(reason,): count for reason, count in sorted(self.finished.items())},
            ("reason",),
        )
        counters = (
            ("prompt_tokens", "Tokens of the prompts of finished answers.", self.prompt_tokens),
            (
                "cached_prompt_tokens",
                "Prompt tokens whose keys and values were found in the cache.",
                self.cached_prompt_tokens,
            ),
            ("completion_tokens", "Tokens of finished answers.", self.completion_tokens),
            ("reasoning_tokens", "Tokens of answers inside thoughts.", self.reasoning_tokens),
            ("disconnects", "Requests whose client left before their end.", self.disconnects),
        )
        for name, what, value in counters:
            yield CounterMetricFamily(f"halfbyte_{name}", what, value=value)
        yield GaugeMetricFamily(
            "halfbyte_answers_running",
            "Answers that were admitted and have not ended.",
            value=self.running,
        )
        histograms = (
            ("request_seconds", "Seconds from admission to an answer's end.", self.request_seconds),
            (
                "first_token_seconds",
                "Seconds from admission to an answer's first token.",
                self.first_token_seconds,
            ),
            (
                "token_seconds",
                "Seconds between two events of a running answer.",
                self.token_seconds,
            ),
            ("prompt_size_tokens", "Tokens of a prompt.", self.prompt_size_tokens),
            ("answer_size_tokens", "Tokens of an answer.", self.answer_size_tokens),
        )
        for name, what, histogram in histograms:
            yield HistogramMetricFamily(
                f"halfbyte_{name}", what, histogram.buckets(), histogram.total
            )

    def _vllm(self, engine: Mapping[str, float], model: str) -> Iterator[Metric]:
        labels, values = ("model_name",), (model,)
        total = engine.get("total_blocks", 0)
        used = (total - engine.get("free_blocks", 0)) / total if total else 0.0
        gauges = (
            ("num_requests_running", "Answers being generated.", engine.get("running", 0)),
            ("num_requests_waiting", "Answers that wait.", engine.get("waiting", 0)),
            ("kv_cache_usage_perc", "Share of the KV cache in use, from 0 to 1.", used),
        )
        for name, what, value in gauges:
            gauge = GaugeMetricFamily(f"vllm:{name}", what, labels=labels)
            gauge.add_metric(values, value)
            yield gauge
        counters = (
            ("prompt_tokens", "Prompt tokens.", self.prompt_tokens),
            ("generation_tokens", "Generated tokens.", self.completion_tokens),
            ("prefix_cache_queries", "Prompt tokens looked up in the cache.", self.prompt_tokens),
            (
                "prefix_cache_hits",
                "Prompt tokens found in the cache.",
                self.cached_prompt_tokens,
            ),
            (
                "spec_decode_num_draft_tokens",
                "Tokens guessed by speculation.",
                engine.get("proposed_tokens", 0),
            ),
            (
                "spec_decode_num_accepted_tokens",
                "Guessed tokens that stood.",
                engine.get("accepted_tokens", 0),
            ),
        )
        for name, what, value in counters:
            yield _counter(f"vllm:{name}", what, {values: value}, labels)
        yield _counter(
            "vllm:request_success",
            "Answers by how they ended.",
            {(model, reason): count for reason, count in sorted(self.finished.items())},
            ("model_name", "finished_reason"),
        )
        histograms = (
            (
                "time_to_first_token_seconds",
                "Seconds to the first token.",
                self.first_token_seconds,
            ),
            ("inter_token_latency_seconds", "Seconds between tokens.", self.token_seconds),
            ("e2e_request_latency_seconds", "Seconds of an answer.", self.request_seconds),
            ("request_prompt_tokens", "Tokens of a prompt.", self.prompt_size_tokens),
            ("request_generation_tokens", "Tokens of an answer.", self.answer_size_tokens),
        )
        for name, what, histogram in histograms:
            family = HistogramMetricFamily(f"vllm:{name}", what, labels=labels)
            family.add_metric(values, histogram.buckets(), histogram.total)
            yield family


class _Families(Collector):
    """Hands finished families to the library's writer, which escapes labels and help texts."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _counter(
    name: str, what: str, values: Mapping[tuple[str, ...], float], labels: tuple[str, ...]
) -> CounterMetricFamily:
    family = CounterMetricFamily(name, what, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def _figures(
    prefix: str, values: Mapping[str, float], known: Mapping[str, _Shown]
) -> Iterator[Metric]:
    for name, value in values.items():
        shown = known[name]
        kind = CounterMetricFamily if shown.kind == "counter" else GaugeMetricFamily
        yield kind(prefix + shown.name, shown.what, value=value)


def _build_info(model: str) -> Metric:
    facts = {"version": halfbyte.__version__, "python": platform.python_version(), "model": model}
    return InfoMetricFamily("halfbyte_build", "What runs here; the value is always 1.", value=facts)
