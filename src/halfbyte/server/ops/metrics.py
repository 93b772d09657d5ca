"""Counters and histograms of one server, written as Prometheus text.

Names begin with `halfbyte_` and follow Prometheus' naming rules: base units, `_total` on what only
grows (https://prometheus.io/docs/practices/naming/). With the vLLM option the figures that its
dashboards read are written once more under `vllm:` names.
"""

import bisect
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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


class _Metric(NamedTuple):
    """How something is published: its name, its kind (one of `_KINDS`), its help text."""

    name: str
    kind: str
    what: str


# Keyed by the fields of `engine.stats.EngineStats`; counters start again with the engine.
ENGINE_FIGURES = {
    "alive": _Metric("alive", "gauge", "1 while the engine takes requests, 0 otherwise."),
    "running": _Metric("running", "gauge", "Answers that are being generated."),
    "waiting": _Metric("waiting", "gauge", "Answers that wait for room in the KV cache."),
    "total_blocks": _Metric("total_blocks", "gauge", "Blocks that the KV cache has."),
    "free_blocks": _Metric("free_blocks", "gauge", "Blocks that no running answer holds."),
    "cached_blocks": _Metric("cached_blocks", "gauge", "Free blocks that can be found again."),
    "block_tokens": _Metric("block_tokens", "gauge", "Tokens that one block holds."),
    "weight_bytes": _Metric("weight_bytes", "gauge", "Bytes of the weights in memory."),
    "cache_bytes": _Metric("cache_bytes", "gauge", "Bytes of the KV cache in memory."),
    "requests": _Metric("requests", "counter", "Requests given to the engine."),
    "steps": _Metric("steps", "counter", "Steps that the engine has run."),
    "step_s": _Metric("step_seconds", "counter", "Seconds that the engine has spent in steps."),
    "preemptions": _Metric("preemptions", "counter", "Answers set back for want of blocks."),
    "prompt_tokens": _Metric("prompt_tokens", "counter", "Prompt tokens given to the engine."),
    "cached_tokens": _Metric("cached_tokens", "counter", "Prompt tokens found in the cache."),
    "generated_tokens": _Metric("generated_tokens", "counter", "Tokens that were generated."),
    "proposed_tokens": _Metric("proposed_tokens", "counter", "Guessed tokens that were checked."),
    "accepted_tokens": _Metric("accepted_tokens", "counter", "Guessed tokens that stood."),
}
PROCESS_FIGURES = {
    "threads": _Metric("threads", "gauge", "Threads of the process outside bounded pools."),
    "pool_threads": _Metric("pool_threads", "gauge", "Workers of the process's bounded pools."),
    "tasks": _Metric("tasks", "gauge", "Tasks of the event loop that are not finished."),
    "resident_bytes": _Metric("resident_bytes", "gauge", "Bytes of memory, all processes'."),
    "open_files": _Metric("open_files", "gauge", "File descriptors the process holds open."),
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
        saturation: Iterable[tuple[str, str, int, int]] = (),
    ) -> str:
        """The whole page. `engine` and `process` hold figures by name, model the served name.

        saturation  as `EngineStats` has it
        """
        families = [
            _build_info(model),
            *self._own(),
            *_figures("halfbyte_process_", process, PROCESS_FIGURES),
            *_figures("halfbyte_engine_", engine, ENGINE_FIGURES),
            *_saturation(tuple(saturation)),
            *(self._vllm(engine, model) if vllm_names else ()),
        ]
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Families(families))
        return generate_latest(registry).decode()

    def _own(self) -> Iterator[Metric]:
        http = {
            (route, str(status)): n for (route, status), n in sorted(self.http_requests.items())
        }
        ends = {(reason,): count for reason, count in sorted(self.finished.items())}
        for metric, values, *labels in (
            (_Metric("http_requests", "counter", "HTTP responses by route and status."),
             http, "route", "status"),
            (_Metric("answers", "counter", "Answers by how they ended."), ends, "reason"),
            (_Metric("prompt_tokens", "counter", "Tokens of the prompts of finished answers."),
             self.prompt_tokens),
            (_Metric("cached_prompt_tokens", "counter", "Prompt tokens found in the cache."),
             self.cached_prompt_tokens),
            (_Metric("completion_tokens", "counter", "Tokens of finished answers."),
             self.completion_tokens),
            (_Metric("reasoning_tokens", "counter", "Tokens of answers inside thoughts."),
             self.reasoning_tokens),
            (_Metric("disconnects", "counter", "Requests whose client left before their end."),
             self.disconnects),
            (_Metric("answers_running", "gauge", "Answers admitted that have not ended."),
             self.running),
            (_Metric("request_seconds", "histogram", "Seconds from admission to an answer's end."),
             self.request_seconds),
            (_Metric("first_token_seconds", "histogram",
                     "Seconds from admission to an answer's first token."),
             self.first_token_seconds),
            (_Metric("token_seconds", "histogram", "Seconds between two events of an answer."),
             self.token_seconds),
            (_Metric("prompt_size_tokens", "histogram", "Tokens of a prompt."),
             self.prompt_size_tokens),
            (_Metric("answer_size_tokens", "histogram", "Tokens of an answer."),
             self.answer_size_tokens),
        ):  # fmt: skip
            yield _family("halfbyte_", metric, values, labels)

    def _vllm(self, engine: Mapping[str, float], model: str) -> Iterator[Metric]:
        total = engine.get("total_blocks", 0)
        used = (total - engine.get("free_blocks", 0)) / total if total else 0.0
        for name, kind, what, value in (
            ("num_requests_running", "gauge", "Answers being generated.", engine.get("running", 0)),
            ("num_requests_waiting", "gauge", "Answers that wait.", engine.get("waiting", 0)),
            ("kv_cache_usage_perc", "gauge", "Share of the KV cache in use, from 0 to 1.", used),
            ("prompt_tokens", "counter", "Prompt tokens.", self.prompt_tokens),
            ("generation_tokens", "counter", "Generated tokens.", self.completion_tokens),
            ("prefix_cache_queries", "counter", "Prompt tokens looked up in the cache.",
             self.prompt_tokens),
            ("prefix_cache_hits", "counter", "Prompt tokens found in the cache.",
             self.cached_prompt_tokens),
            ("spec_decode_num_draft_tokens", "counter", "Tokens guessed by speculation.",
             engine.get("proposed_tokens", 0)),
            ("spec_decode_num_accepted_tokens", "counter", "Guessed tokens that stood.",
             engine.get("accepted_tokens", 0)),
            ("time_to_first_token_seconds", "histogram", "Seconds to the first token.",
             self.first_token_seconds),
            ("inter_token_latency_seconds", "histogram", "Seconds between tokens.",
             self.token_seconds),
            ("e2e_request_latency_seconds", "histogram", "Seconds of an answer.",
             self.request_seconds),
            ("request_prompt_tokens", "histogram", "Tokens of a prompt.", self.prompt_size_tokens),
            ("request_generation_tokens", "histogram", "Tokens of an answer.",
             self.answer_size_tokens),
        ):  # fmt: skip
            yield _family("vllm:", _Metric(name, kind, what), {(model,): value}, ["model_name"])
        ends = {(model, reason): count for reason, count in sorted(self.finished.items())}
        success = _Metric("request_success", "counter", "Answers by how they ended.")
        yield _family("vllm:", success, ends, ["model_name", "finished_reason"])


class _Families(Collector):
    """Hands finished families to the library's writer, which escapes labels and help texts."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


_Value = float | Histogram
_KINDS: Mapping[str, Any] = {
    "counter": CounterMetricFamily,
    "gauge": GaugeMetricFamily,
    "histogram": HistogramMetricFamily,
}


def _family(
    prefix: str,
    metric: _Metric,
    values: _Value | Mapping[Any, _Value],
    labels: Sequence[str] = (),
) -> Metric:
    """A family of one value, or of one for each tuple of its labels' values."""
    family: Any = _KINDS[metric.kind](prefix + metric.name, metric.what, labels=labels)
    for key, value in (values if isinstance(values, Mapping) else {(): values}).items():
        if isinstance(value, Histogram):
            family.add_metric(key, value.buckets(), value.total)
        else:
            family.add_metric(key, value)
    made: Metric = family
    return made


def _figures(
    prefix: str, values: Mapping[str, float], known: Mapping[str, _Metric]
) -> Iterator[Metric]:
    for name, value in values.items():
        yield _family(prefix, known[name], value)


def _saturation(counts: tuple[tuple[str, str, int, int], ...]) -> Iterator[Metric]:
    """Clipped activations by linear and rows; nothing of an engine that does not count them."""
    if not counts:
        return
    for name, what, place in (
        (
            "saturated_activations",
            "Activations that took the largest FP8 value of their linear's input scale.",
            2,
        ),
        ("rounded_activations", "Activations that were held against an input scale.", 3),
    ):
        values: dict[tuple[str, ...], _Value] = {(o[0], o[1]): float(o[place]) for o in counts}
        metric = _Metric(name, "counter", what)
        yield _family("halfbyte_engine_", metric, values, ["linear", "rows"])


def _build_info(model: str) -> Metric:
    facts = {"version": halfbyte.__version__, "python": platform.python_version(), "model": model}
    return InfoMetricFamily("halfbyte_build", "What runs here; the value is always 1.", value=facts)
