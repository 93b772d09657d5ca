"""The card: every section, a metadata block the hub reads, every figure linked to a record."""

import importlib
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from halfbyte.card.facts import CheckpointFacts, compare_arms, read_arm, read_figures
from halfbyte.card.render import CardInput, render_card, write_card
from halfbyte.checkpoint.metadata import Quantization
from halfbyte.cli.main import COMMANDS, build_parser
from halfbyte.config import ModelConfig, RopeConfig, TextConfig
from halfbyte.errors import UsageError
from halfbyte.evals.records import FORMAT, Journal, Record, RunRecord, record_row, write_run
from halfbyte.evals.summary import summarise

SECTIONS = [
    "Model overview", "Description", "Terms of use", "Deployment geography", "Use case",
    "Release date", "Model architecture", "Input", "Output", "Software integration",
    "Model version", "Training data", "Calibration data", "Evaluation data",
    "Post-training quantization", "Usage", "Evaluation", "Speed", "Fidelity to the source",
    "Limitations", "Ethical considerations", "Records",
]  # fmt: skip


def checkpoint() -> CheckpointFacts:
    text = TextConfig(
        30, 576, 9, 3, 64, 1536, 49_152, 1e-5, 8192, RopeConfig(1e5), True, 1, (2,), None
    )
    formats: Any = {"decoder.0.attention.q": "fp8", "decoder.0.mlp.up": "nvfp4"}
    return CheckpointFacts(
        folder="small-nvfp4",
        config=ModelConfig(text, None),
        quantization=Quantization("modelopt", formats, "fp8"),
        formats={"attention": {"fp8": 120}, "mlp": {"fp8": 15, "nvfp4": 75}},
        layers_by_format={"attention fp8": "0-29", "mlp fp8": "0-3, 29", "mlp nvfp4": "4-28"},
        weight_bytes=133_924_680,
        made_of={
            "recipe": {"name": "medium-3.5", "scales": {"weights": "amax", "activations": "amax"}},
            "profile": "ieee",
            "calibration": {"rows": 46, "tokens": 10_858, "longest": 512, "sha256": "da" * 32},
        },
    )


def arm(folder: Path, name: str, right: int, items: int = 30, note: str = "") -> Any:
    records = [
        Record(
            name, name, "aime2025", "p", "h", f"i{i}", f"i{i}", "AIME I", 0, 1, f"secret {i}", "",
            "stop", 5, 7, 2, 0.5, "1", "2", float(i < right), "ok" if i < right else "wrong", {},
            None, 0,
        )
        for i in range(items)
    ]  # fmt: skip
    journal = Journal(folder / name / "aime2025" / "samples.jsonl")
    for one in records:
        journal.append(record_row(one))
    journal.close()
    identity = {
        "name": "aime2025", "title": "AIME 2025", "full_items": 30, "prompt_id": "p",
        "prompts_sha256": "h", "scorer": "integer equality", "source": "math-ai/aime25, test",
        "licence": "(c) MAA", "notes": [], "max_tokens": 9,
        "provenance": {"source": "kept", "revision": "r9", "sha256": {}, "note": note},
    }  # fmt: skip
    expected = [(r.item_id, 0) for r in records]
    result = summarise(
        identity, records, expected=expected, partial=False, has_groups=False, wall_s=2.0
    )
    settings = {
        "temperature": 0.7, "top_p": 0.95, "reasoning_effort": "high", "max_tokens": 9,
    }  # fmt: skip
    run = RunRecord(
        FORMAT, f"{name}-id", name, "m", "u", {}, {}, settings, None, None, {}, "x86", "c", "", "",
        {"aime2025": result},
    )  # fmt: skip
    write_run(folder / name / "run.json", run)
    return read_arm(folder / name)


def given(tmp_path: Path, **changes: Any) -> CardInput:
    arms = changes.pop("arms", None)
    if arms is None:
        arms = [arm(tmp_path, "fp8", 20), arm(tmp_path, "mixed", 19)]
    comparison = compare_arms(arms) if arms else None
    defaults: dict[str, Any] = {"base_model": "some/base", "figures": {}}
    return CardInput(checkpoint(), arms, comparison, **{**defaults, **changes})


def metadata(card: str) -> dict[str, Any]:
    _, block, _ = card.split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(block)
    return found


def test_every_section_is_there(tmp_path: Path) -> None:
    card = render_card(given(tmp_path))
    headings = re.findall(r"^#{2,3} (.+)$", card, re.MULTILINE)
    assert [h for h in headings if h in SECTIONS] == SECTIONS
    assert "{" not in re.sub(r"```.*?```", "", card, flags=re.DOTALL)


def test_metadata_is_what_the_hub_reads(tmp_path: Path) -> None:
    block = metadata(render_card(given(tmp_path)))
    assert block["base_model"] == "some/base"
    assert block["base_model_relation"] == "quantized"
    assert "nvfp4" in block["tags"]
    (result,) = block["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == pytest.approx(63.33)
    hub = pytest.importorskip("huggingface_hub", reason="checks the block with the hub's own code")
    card = hub.ModelCard(render_card(given(tmp_path)))
    assert card.data.base_model == "some/base"
    (evaluated,) = card.data.eval_results
    assert (evaluated.dataset_type, evaluated.metric_type) == ("math-ai/aime25", "accuracy")
    # Links of the block are addresses or absent: the hub does not read them from the card's folder.
    assert "source" not in result and "license_link" not in block
    at_home = metadata(render_card(given(tmp_path, repository="me/small")))
    assert at_home["model-index"][0]["results"][0]["source"]["url"] == (
        "https://huggingface.co/me/small/blob/main/evaluation/mixed.run.json"
    )


def test_every_figure_of_the_evaluation_links_to_a_record_that_is_there(tmp_path: Path) -> None:
    card_file = write_card(tmp_path / "card", given(tmp_path))
    card = card_file.read_text()
    links = set(re.findall(r"\]\((evaluation/[^)]+)\)", card))
    assert links == {
        "evaluation/fp8.run.json", "evaluation/mixed.run.json", "evaluation/comparison.json"
    }  # fmt: skip
    assert all((card_file.parent / link).exists() for link in links)
    for line in card.split("\n## Evaluation\n")[1].split("\n## Speed")[0].splitlines():
        if line.startswith("|") and re.search(r"\d\.\d\d", line):
            assert "](evaluation/" in line, line
    stored = json.loads((tmp_path / "card" / "evaluation" / "mixed.run.json").read_text())
    assert stored["benchmarks"]["aime2025"]["score"] == pytest.approx(19 / 30)


def test_published_records_hold_no_answers(tmp_path: Path) -> None:
    card_file = write_card(tmp_path / "card", given(tmp_path))
    for file in card_file.parent.rglob("*"):
        if file.is_file():
            assert "secret" not in file.read_text()


def test_what_no_record_covers_is_stated_as_not_measured(tmp_path: Path) -> None:
    card = render_card(given(tmp_path))
    assert "Not measured for this checkpoint: MMLU Pro, GPQA Diamond, AA-LCR" in card
    assert "Not measured: no record of speed was given." in card
    empty = render_card(given(tmp_path, arms=[]))
    assert "no evaluation record was given" in empty
    assert "model-index" not in metadata(empty)


def test_a_part_of_a_set_or_made_up_items_are_no_result_of_the_set(tmp_path: Path) -> None:
    part = [arm(tmp_path / "p", "mixed", 5, items=10)]
    assert "model-index" not in metadata(render_card(given(tmp_path, arms=part)))
    made_up = [arm(tmp_path / "m", "mixed", 5, note="made-up items")]
    card = render_card(given(tmp_path, arms=made_up))
    assert "model-index" not in metadata(card)
    assert card.count("made-up items") == 2


def test_a_checkpoints_note_stands_at_the_head_and_under_limitations(tmp_path: Path) -> None:
    noted = replace(checkpoint(), note="the vision tower is untrained")
    choices: tuple[list[Any] | None, ...] = (None, [])
    for arms in choices:
        card = render_card(replace(given(tmp_path, arms=arms), checkpoint=noted))
        head, _, limits = card.partition("## Limitations")
        assert "**Note: the vision tower is untrained.**" in head
        assert "The vision tower is untrained." in limits
    assert "Note:" not in render_card(given(tmp_path))


def test_small_evaluations_do_not_claim_equality(tmp_path: Path) -> None:
    card = render_card(given(tmp_path))
    assert "too small to say whether it loses accuracy" in card
    assert "INCONCLUSIVE" in card


def test_the_first_sentence_says_what_the_comparison_found(tmp_path: Path) -> None:
    def head(baseline: int, candidate: int, items: int = 30, **changes: Any) -> str:
        folder = tmp_path / f"{baseline}-{candidate}-{items}"
        arms = [arm(folder, "fp8", baseline, items), arm(folder, "mixed", candidate, items)]
        comparison = compare_arms(arms)
        assert comparison is not None
        whole = replace(given(tmp_path, arms=arms), comparison=replace(comparison, **changes))
        return render_card(whole).partition("## Model overview")[0]

    assert "no loss beyond the margins fixed beforehand was found" in head(400, 400, 400)
    assert "base: a loss beyond the margins fixed beforehand was found" in head(400, 300, 400)
    assert "too small to say whether it loses accuracy" in head(20, 20)
    shown = head(400, 392, 400)
    assert "it loses accuracy on AIME 2025; whether beyond the margins" in shown
    assert "not complete enough to say" in head(20, 20, reason="blocked")


def test_a_card_says_where_a_margin_came_from(tmp_path: Path) -> None:
    arms = [arm(tmp_path, "fp8", 400, 400), arm(tmp_path, "mixed", 396, 400)]
    comparison = compare_arms(arms, margins={"aime2025": 0.05, "macro": 0.05})
    card = render_card(replace(given(tmp_path, arms=arms), comparison=comparison))
    assert "no loss beyond the margins given with the comparison was found" in card
    assert "| 5.0 (flag) | GO |" in card


def test_quantization_is_described_from_the_checkpoint(tmp_path: Path) -> None:
    card = render_card(given(tmp_path))
    assert "| mlp | NVFP4 | 4-28 | 75 |" in card
    assert "| mlp | FP8 | 0-3, 29 | 15 |" in card
    assert "46 samples, 10,858 tokens" in card
    assert "--max-model-len 8192" in card


def test_commands_of_the_card_are_commands_we_have(tmp_path: Path) -> None:
    card = render_card(given(tmp_path))
    lines = [line for block in re.findall(r"```sh\n(.*?)```", card, re.DOTALL)
             for line in block.splitlines() if line.startswith("halfbyte ")]  # fmt: skip
    assert {line.split()[1] for line in lines} == {"serve", "verify", "evaluate"}
    for line in lines:
        _, name, *arguments = shlex.split(line)
        module = importlib.import_module(f"halfbyte.cli.{COMMANDS[name][0]}")
        build_parser(name, module).parse_args(arguments)  # exits where a flag is unknown


def test_a_comparison_of_distributions_becomes_a_table(tmp_path: Path) -> None:
    row = {
        "name": "mixed", "mode": "weight_only", "bytes": 5, "perplexity": 12.5, "kl_mean": 0.03,
        "kl_interval": [0.02, 0.04], "kl_p99": 0.4, "kl_max": 1.0, "top1_agreement": 0.9,
        "kl_median": 0.01, "flips": {"items": 20, "base_right": 9, "right": 8, "lost": 2, "won": 1,
                                     "changed_wrong": 1},
    }  # fmt: skip
    record = {"base": {"name": "fp8", "perplexity": 12.0}, "candidates": [row], "num_tokens": 4096}
    file = tmp_path / "fidelity.json"
    file.write_text(json.dumps(record))
    card = render_card(given(tmp_path, figures=read_figures([file])))
    section = card.split("## Fidelity to the source")[1].split("\n## ")[0]
    assert "| mixed | [12.500](evaluation/fidelity.json) | 0.0300 (0.0200 to 0.0400) |" in section
    assert "4 of 20: 2 lost, 1 won" in section
    assert "no verdict above rests on them" in section
    file.write_text('{"something": "else"}')
    with pytest.raises(UsageError, match="neither a benchmark record"):
        read_figures([file])


def test_speed_records_are_quoted_and_copied(tmp_path: Path) -> None:
    record = {"name": "serving", "question": "How fast?", "results": {"tokens_per_s": 12.5}}
    card_file = write_card(tmp_path / "card", given(tmp_path, figures={"serving.json": record}))
    assert "tokens_per_s: [12.5](evaluation/serving.json)" in card_file.read_text()
    assert (tmp_path / "card" / "evaluation" / "serving.json").exists()


@pytest.mark.parametrize(
    "verdict, says_no_loss, says_a_loss",
    [("GO", True, False), ("NO-GO", False, True), ("INCONCLUSIVE", False, False)],
)
def test_the_first_sentence_says_what_the_verdict_says(
    tmp_path: Path, verdict: Any, says_no_loss: bool, says_a_loss: bool
) -> None:
    full = given(tmp_path)
    assert full.comparison is not None
    decided = replace(full, comparison=replace(full.comparison, verdict=verdict))
    body = render_card(decided).split("\n---\n", 1)[1]
    first = body.split("## Model overview")[0]
    assert bool(re.search(r"\bno loss\b.* was found", first)) is says_no_loss
    assert bool(re.search(r"(?<!no )\b(a loss)\b.* was found", first)) is says_a_loss
    assert ("too small to say" in first) is not (says_no_loss or says_a_loss)
