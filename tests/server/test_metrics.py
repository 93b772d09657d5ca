"""The metrics page: names, kinds, help texts and labels as Prometheus wants them."""

import dataclasses
import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from halfbyte.engine.core import EngineStats
from halfbyte.server.ops import process_figures as process
from halfbyte.server.ops.metrics import ENGINE_FIGURES, PROCESS_FIGURES, Metrics

_FIGURES = {field.name for field in dataclasses.fields(EngineStats)} - {"saturation"}
ENGINE = dict.fromkeys(_FIGURES, 3.0) | {"alive": 1.0}


def busy() -> Metrics:
    metrics = Metrics()
    metrics.count_http("/v1/models", 200)
    metrics.count_finish("stop")
    metrics.prompt_tokens = 7
    for seconds in (0.001, 0.02, 400.0):
        metrics.request_seconds.observe(seconds)
    return metrics


def test_every_figure_of_engine_and_process_has_a_name_and_a_help_text() -> None:
    assert set(ENGINE) == set(ENGINE_FIGURES)
    figures = [*ENGINE_FIGURES.values(), *PROCESS_FIGURES.values()]
    assert all(len(figure.what.split()) > 3 and figure.what.endswith(".") for figure in figures)


async def test_every_figure_of_the_process_is_known() -> None:
    assert set(process.figures()) <= set(PROCESS_FIGURES)


@given(st.text(st.characters(codec="utf-8"), min_size=1), st.text(st.characters(codec="utf-8")))
def test_any_name_of_a_model_or_route_can_be_read_back(model: str, route: str) -> None:
    metrics = busy()
    metrics.count_http(route, 418)
    text = metrics.text(ENGINE, {}, model, vllm_names=True)
    families = {family.name: family for family in text_string_to_metric_families(text)}
    (running,) = families["vllm:num_requests_running"].samples
    assert running.labels == {"model_name": model} and running.value == 3
    assert families["halfbyte_build_info"].samples[0].labels["model"] == model
    requests = families["halfbyte_http_requests"].samples
    assert [s.value for s in requests if s.labels == {"route": route, "status": "418"}] == [1]


def test_what_only_grows_is_a_counter_and_histograms_are_cumulative() -> None:
    text = busy().text(ENGINE, {}, "m")
    families = {family.name: family for family in text_string_to_metric_families(text)}
    totals = ("requests", "steps", "step_seconds", "preemptions", "generated_tokens")
    assert {families[f"halfbyte_engine_{name}"].type for name in totals} == {"counter"}
    assert families["halfbyte_engine_free_blocks"].type == "gauge"
    histogram = families["halfbyte_request_seconds"].samples
    counts = [sample.value for sample in histogram if sample.name.endswith("_bucket")]
    assert counts[0] == 1 and counts[2] == 2 and counts[-2:] == [2, 3]
    (total,) = [sample.value for sample in histogram if sample.name.endswith("_sum")]
    assert total == pytest.approx(400.021)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_finds_nothing() -> None:
    text = busy().text(ENGINE, {"threads": 2.0, "resident_bytes": 5.0}, "m")
    found = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True
    )
    assert (found.returncode, found.stdout + found.stderr) == (0, "")
