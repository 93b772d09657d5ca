"""The demo's own parts: it spares foreign directories, sums up what was measured, stops servers.

The whole story is `make demo`; here its steps run on small inputs.
"""

import json
from pathlib import Path

import pytest

from halfbyte.calibrate.documents import builtin_documents
from halfbyte.cli import demo_steps as demo
from halfbyte.cli import demo_tools
from halfbyte.errors import UnsupportedError, UsageError
from halfbyte.fidelity.comparison import FidelityComparison, ModelRow


def comparison() -> FidelityComparison:
    rows = [
        ModelRow("fp8", "weight_only", 60, 10.5, 0.01, None, 0.1, 0.2, 0.9),
        ModelRow("mixed", "weight_only", 50, 11.0, 0.05, None, 0.3, 0.4, 0.8),
        ModelRow("mixed", "declared", 50, 12.0, 0.09, None, 0.5, 0.6, 0.7),
    ]
    return FidelityComparison(
        ModelRow("bf16", "weight_only", 100, 10.0), tuple(rows), "", 1, 10, 11, "full"
    )


def answers() -> list[demo.TimedAnswer]:
    return [demo.TimedAnswer("?", "!", 5, 0.1, rate) for rate in (40.0, 0.0, 50.0, 60.0)]


def test_foreign_directory_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="no demo made"):
        demo.empty_directory(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("x")
    with pytest.raises(UsageError):
        demo.empty_directory(path)


def test_a_demos_own_directory_is_emptied(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "demo"
    demo.empty_directory(out)
    (out / "summary.json").write_text("{}")
    demo.empty_directory(out)
    assert [path.name for path in out.iterdir()] == [demo.MARKER]


def test_summary_has_every_figure_by_variant(tmp_path: Path) -> None:
    summary = demo.summarize(comparison(), answers())
    assert summary["bytes"] == {"bf16": 100, "fp8": 60, "mixed": 50, "mixed_declared": 50}
    assert summary["perplexity"]["mixed_declared"] == 12.0
    for key in ("kl_mean", "kl_p99", "top1_agreement"):
        assert set(summary[key]) == {"fp8", "mixed", "mixed_declared"}
    # An answer of one token has no rate and must not pull the median down.
    assert summary["decode_tokens_per_s"] == 50.0
    json.dumps(summary)


def test_plot_shows_every_variant(tmp_path: Path) -> None:
    path = tmp_path / "comparison.png"
    demo.plot(demo.summarize(comparison(), answers()), path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_held_out_text_is_no_calibration_text() -> None:
    held_out = demo.HELD_OUT.read_text(encoding="utf-8").split()
    runs = {tuple(held_out[start : start + 8]) for start in range(len(held_out) - 7)}
    for _, text in builtin_documents():
        words = text.split()
        assert not any(tuple(words[start : start + 8]) in runs for start in range(len(words) - 7))


# Starts a Python process that imports torch, on a machine that may be busy.
@pytest.mark.timeout(60)
def test_server_that_cannot_start_is_reported_with_its_log(tmp_path: Path) -> None:
    narrator = demo_tools.Narrator()
    directory = tmp_path / "empty"
    directory.mkdir()
    with (
        pytest.raises(UnsupportedError, match=r"did not start(.|\n)*no tokenizer\.json"),
        demo_tools.serving(directory, narrator),
    ):
        pytest.fail("nothing to serve")
