"""The card: every section, a metadata block the hub reads, every figure linked to a record."""

import hashlib
import importlib
import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from halfbyte.card.base import Base, find_base
from halfbyte.card.facts import (
    CheckpointFacts,
    compare_arms,
    read_arm,
    read_checkpoint,
    read_figures,
)
from halfbyte.card.given import CardInput
from halfbyte.card.published import findings
from halfbyte.card.render import render_card, write_card
from halfbyte.checkpoint.metadata import Quantization
from halfbyte.cli.main import COMMANDS, build_parser
from halfbyte.config import ModelConfig, RopeConfig, TextConfig
from halfbyte.errors import UsageError
from halfbyte.evals.judging.summary import summarise
from halfbyte.evals.records import (
    FORMAT,
    GradedAttempt,
    RunRecord,
    record_row,
    write_run,
)
from halfbyte.evals.tasks.published import NOT_COMPARED
from halfbyte.fidelity.comparison import FidelityComparison, Interval, ModelRow, PairRow
from halfbyte.figures import CARD_TOPICS, read_record
from halfbyte.json_lines import JsonLines
from halfbyte.model.tiny import write_tiny_checkpoint

TEKKEN = Path(__file__).parents[1] / "data" / "chat" / "tekken" / "tekken.json"

SECTIONS = [
    "Model overview", "Description", "Base model and makers", "Terms of use",
    "Deployment geography", "Use case", "Languages", "Release date", "Model architecture",
    "Input", "Output", "Software integration", "Model version", "Training data",
    "Calibration data", "Evaluation data",
    "Post-training quantization", "Usage", "Evaluation", "Speed", "Fidelity to the source",
    "Limitations", "Ethical considerations", "Contact",
    "Records",
]  # fmt: skip


IDENTITY = "tensors:" + "5c" * 32


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
        identity=IDENTITY,
        made_of={
            "recipe": {"name": "medium-3.5", "scales": {"weights": "amax", "activations": "amax"}},
            "profile": "ieee",
            "calibration": {"rows": 46, "tokens": 10_858, "longest": 512, "sha256": "da" * 32},
        },
    )


def arm(folder: Path, name: str, right: int, items: int = 30, note: str = "") -> Any:
    records = [
        GradedAttempt(
            name, name, "aime2025", "p", "h", f"i{i}", f"i{i}", "AIME I", 0, 1, f"secret {i}", "",
            "stop", 5, 7, 2, 0.5, "1", "2", float(i < right), "ok" if i < right else "wrong", {},
            None, 0,
        )
        for i in range(items)
    ]  # fmt: skip
    journal = JsonLines(folder / name / "aime2025" / "samples.jsonl")
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
        FORMAT, f"{name}-id", name, "m", "u", {}, {"identity": IDENTITY}, settings, None, None,
        {}, "x86", "c", "", "", {"aime2025": result},
    )  # fmt: skip
    write_run(folder / name / "run.json", run)
    return read_arm(folder / name)


def given(tmp_path: Path, **changes: Any) -> CardInput:
    arms = changes.pop("arms", None)
    if arms is None:
        arms = [arm(tmp_path, "fp8", 20), arm(tmp_path, "mixed", 19)]
    comparison = compare_arms(arms) if arms else None
    defaults: dict[str, Any] = {"base": Base("some/base", "It is stated."), "figures": {}}
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


@pytest.mark.parametrize(
    ("provenance", "said"),
    [
        (
            {"source": "x", "revision": "r9", "note": ""},
            "math-ai/aime25, test: the published items",
        ),
        ({"source": "x", "revision": None, "note": ""}, "**a local copy, not compared with"),
        (
            {"source": "x", "revision": None, "note": "", "checked": "29 of 30"},
            "the published items, compared by content (29 of 30)",
        ),
        (
            {"source": "x", "revision": None, "note": NOT_COMPARED, "checked": ""},
            f"**{NOT_COMPARED}**",
        ),
        ({"source": "x", "revision": "r9", "note": "made-up items"}, "**made-up items**"),
        ({}, "**a local copy, not compared with"),
    ],
)
def test_a_card_says_which_items_were_asked(
    tmp_path: Path, provenance: dict[str, Any], said: str
) -> None:
    one = arm(tmp_path, "mixed", 19)
    result = replace(one.run.benchmarks["aime2025"], provenance=provenance)
    run = replace(one.run, benchmarks={"aime2025": result})
    card = render_card(given(tmp_path, arms=[replace(one, run=run)]))
    assert said in card
    assert ("model-index" in metadata(card)) is ("the published items" in said)


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
    assert "base): a loss beyond the margins fixed beforehand was found" in head(400, 300, 400)
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
    # That of the mean is one of them.
    comparison = compare_arms(arms, margins={"macro": 0.05})
    assert comparison is not None and comparison.benchmarks["aime2025"].margin_origin == "default"
    card = render_card(replace(given(tmp_path, arms=arms), comparison=comparison))
    assert "fixed beforehand" not in card.partition("## Model overview")[0]
    assert "| macro mean |" in card and card.count("5.0 (flag)") == 1


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
        "name": "mixed", "checkpoint": IDENTITY, "mode": "weight_only", "bytes": 5,
        "perplexity": 12.5, "kl_mean": 0.03,
        "kl_interval": [0.02, 0.04], "kl_p99": 0.4, "kl_max": 1.0, "top1_agreement": 0.9,
        "kl_median": 0.01, "flips": {"items": 20, "base_right": 9, "right": 8, "lost": 2, "won": 1,
                                     "changed_wrong": 1},
    }  # fmt: skip
    base = {"name": "fp8", "mode": "weight_only", "bytes": 9, "perplexity": 12.0}
    told = {"text_sha256": "0", "num_windows": 8, "window_tokens": 512, "method": "full"}
    record = {**told, "base": base, "candidates": [row], "num_tokens": 4096}
    file = tmp_path / "fidelity.json"
    file.write_text(json.dumps(record))
    card = render_card(given(tmp_path, figures=read_figures([file])))
    section = card.split("## Fidelity to the source")[1].split("\n## ")[0]
    assert (
        "| mixed | [12.500](evaluation/fidelity.json) | not measured | 0.0300 (0.0200 to 0.0400) |"
        in section
    )
    assert "second minus first" not in section
    assert "4 of 20: 2 lost, 1 won" in section
    assert "no verdict above rests on them" in section
    file.write_text(json.dumps({**record, "base": {"name": "fp8"}}))
    with pytest.raises(UsageError, match=r"fidelity\.json is not a comparison as"):
        render_card(given(tmp_path, figures=read_figures([file])))
    file.write_text('{"something": "else"}')
    with pytest.raises(UsageError, match="neither a benchmark record"):
        read_figures([file])


FIGURE = {"name": "decode", "value": 12.5, "unit": "tokens/s", "topic": "decode"}


def test_our_own_records_show_numbers_with_units_once_and_no_bookkeeping(tmp_path: Path) -> None:
    told = 0
    for path in sorted((Path(__file__).parents[2] / "benchmarks" / "records").glob("*.json")):
        raw = json.loads(path.read_text())
        shown = [f for f in read_record(path).figures if f.topic in CARD_TOPICS]
        own = given(tmp_path, figures={path.name: {**raw, "checkpoint": IDENTITY}})
        if not shown:
            with pytest.raises(UsageError, match="no speed of a model"):
                render_card(own)
            continue
        section = render_card(own).split("## Speed")[1].split("\n## ")[0]
        rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
        assert len(rows) == len(set(rows)) == len(shown)
        for line, figure in zip(rows, shown, strict=True):
            value = line.split(" | ")[2]
            assert value == figure.value_text and re.fullmatch(r"[\d.,]+ [a-zA-Z%/]+", value)
        assert not re.search(r"[a-z]_[a-z]|None|nan|\{|others.share|samples", "\n".join(rows))
        told += len(rows)
    assert told > 60


def test_a_record_from_before_figures_were_typed_still_shows_its_rows(tmp_path: Path) -> None:
    rows = [{"users": 1, "first_token_s": 0.25, "output_tokens_per_s": 12.5}, {"users": "many"}]
    old = {name: value for name, value in speed_record().items() if name != "figures"}
    card = render_card(given(tmp_path, figures={"s.json": old | {"results": {"speed": rows}}}))
    assert "| time to the first token | users 1 | 0.250 s | - |" in card
    assert "| output | users 1 | 12.5 tokens/s | - |" in card


def test_paired_intervals_of_a_comparison_reach_the_card(tmp_path: Path) -> None:
    """What `halfbyte compare` writes, not a record made up here; the other's own row stays out."""

    def model(name: str, **more: Any) -> ModelRow:
        return ModelRow(
            name=name, mode="declared" if name == "b" else "weight_only", bytes=1,
            perplexity=12.5, perplexity_interval=Interval(12.25, 12.75), **more,
        )  # fmt: skip

    def candidate(name: str) -> ModelRow:
        return model(
            name, kl_mean=0.03, kl_interval=Interval(0.02, 0.04), kl_p99=0.4, top1_agreement=0.9,
            log_perplexity_change=0.0125,
            log_perplexity_change_interval=Interval(-0.001, 0.025),
        )  # fmt: skip

    def pair(first: str, second: str, interval: Interval | None) -> PairRow:
        return PairRow(first, second, -0.0125, interval, 0.0225, Interval(0.01, 0.035))

    found = FidelityComparison(
        base=model("fp8"),
        candidates=tuple(map(candidate, "abcd")),
        text_sha256="0", num_windows=6, num_tokens=3000, window_tokens=512, method="full",
        pairs=(pair("a", "b (declared)", Interval(-0.02, -0.005)), pair("a", "c", None),
               pair("c", "d", None)),
    )  # fmt: skip
    file = tmp_path / "fidelity.json"
    record = found.as_dict()
    for row in record["candidates"]:
        row["checkpoint"] = IDENTITY if row["name"] in "ab" else "tensors:00"
    file.write_text(json.dumps(record))
    section = render_card(given(tmp_path, figures=read_figures([file])))
    section = section.split("## Fidelity to the source")[1].split("\n## ")[0]
    at = "(evaluation/fidelity.json)"
    assert f"| fp8 | [12.500]{at} (12.250 to 12.750) | - |" in section
    shown = "+0.0125 (-0.0010 to +0.0250) | 0.0300 (0.0200 to 0.0400) |"
    assert f"| b (declared) | [12.500]{at} (12.250 to 12.750) | {shown}" in section
    logs = "+0.0225 (+0.0100 to +0.0350) |"
    assert f"| b (declared) minus a | -0.01250 (-0.02000 to -0.00500) | {logs}" in section
    assert f"| c minus a | -0.01250 | {logs}" in section
    assert "d minus c" not in section and "| c |" not in section


def speed_record(**changes: Any) -> dict[str, Any]:
    conditions = {"users": 1, "prompt tokens": 512}
    figures = [
        {"name": "time to the first token", "value": 0.25, "unit": "s", "topic": "serving",
         "conditions": conditions, "against": [{"what": "at most", "value": 1, "is_bound": True}]},
        {"name": "decode", "value": 12.5, "unit": "tokens/s", "topic": "decode",
         "conditions": conditions, "against": [{"what": "peer", "value": 5}], "is_headline": True},
        {"name": "of the peer", "value": 5, "unit": "tokens/s", "topic": "peer"},
    ]  # fmt: skip
    machine = {"processor": "CPU X", "cores": 2, "versions": {"torch": "2.13.0"}}
    return {
        "name": "speed", "question": "?", "command": "halfbyte bench cpu /home/ann/mixed",
        "machine": machine, "checkpoint": IDENTITY, "figures": figures,
        "results": {"rounds": 77}, **changes,
    }  # fmt: skip


def test_speed_is_a_table_of_this_checkpoint_on_a_named_machine(tmp_path: Path) -> None:
    card_file = write_card(tmp_path / "card", given(tmp_path, figures={"s.json": speed_record()}))
    section = card_file.read_text().split("## Speed")[1].split("\n## ")[0]
    assert "Measured on CPU X, 2 cores by `halfbyte bench cpu mixed`" in section
    under = "users 1, prompt tokens 512"
    assert f"| time to the first token | {under} | 0.250 s | at most 1 s |" in section
    assert f"| decode | {under} | 12.5 tokens/s | peer: 5 tokens/s (2.50x) |" in section
    # Neither the peer's own figures nor what the benchmark keeps for itself.
    assert "of the peer" not in section and "77" not in section and "rounds" not in section
    assert "ann" not in (tmp_path / "card" / "evaluation" / "s.json").read_text()


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (speed_record(checkpoint="tensors:" + "00" * 32), "measured another checkpoint"),
        ({k: v for k, v in speed_record().items() if k != "checkpoint"}, "does not say which"),
        (speed_record(figures=[], results={"gap_ratio": 1.5}), "no speed of a model"),
        (speed_record(figures=[FIGURE | {"topic": "quantize"}]), "no speed of a model"),
        (speed_record(figures=[FIGURE | {"topic": "speed"}]), "topic is 'speed'; it must be one"),
        (speed_record(figures=[FIGURE | {"value": float("nan")}]), "must be a finite number"),
        (speed_record(figures="fast"), "it must be a list"),
        ({"base": {}, "candidates": [{"checkpoint": "tensors:00"}]}, "another checkpoint"),
        ({"base": {}, "candidates": [{"name": "x"}]}, "does not say which"),
        ({"base": {}, "candidates": []}, "does not say which"),
    ],
)
def test_records_of_others_are_refused(tmp_path: Path, record: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        write_card(tmp_path / "card", given(tmp_path, figures={"s.json": record}))
    assert not (tmp_path / "card").exists()


@pytest.mark.parametrize("checkpoint", [{}, {"identity": "tensors:1"}, {"headers sha256": "0"}])
def test_a_run_of_another_checkpoint_is_refused(tmp_path: Path, checkpoint: dict[str, str]) -> None:
    card = given(tmp_path)
    baseline, mixed = card.arms
    other = replace(mixed, run=replace(mixed.run, checkpoint=checkpoint))
    with pytest.raises(UsageError, match=r"run mixed .*checkpoint"):
        render_card(replace(card, arms=[baseline, other]))
    # The baseline is another checkpoint by its nature.
    first = replace(baseline, run=replace(baseline.run, checkpoint=checkpoint))
    assert "2025" in render_card(replace(card, arms=[first, mixed]))


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


def test_the_hub_reads_the_whole_block_and_loses_nothing(tmp_path: Path) -> None:
    """By the hub's own parser, which turns `model-index` into results and back."""
    hub = pytest.importorskip("huggingface_hub", reason="extra 'hub' is not installed")
    named = replace(
        given(tmp_path, repository="me/small-nvfp4"),
        checkpoint=replace(checkpoint(), made_of={**checkpoint().made_of, **BLEND}),
        licence_name="modified-mit", licence_link="LICENSE", languages=["en", "fr"],
    )  # fmt: skip
    card = render_card(named)
    block = metadata(card)
    read = hub.ModelCard(card, ignore_metadata_errors=False)
    assert read.data.to_dict() == {**block, "model-index": read.data.to_dict()["model-index"]}
    ours, theirs = block["model-index"][0], read.data.to_dict()["model-index"][0]
    assert theirs["name"] == ours["name"] == "small-nvfp4"
    (mine,), (back,) = ours["results"], theirs["results"]
    assert back["task"] == mine["task"] and back["source"] == mine["source"]
    assert back["dataset"] == mine["dataset"] and back["metrics"] == mine["metrics"]
    assert block["datasets"] == ["nvidia/Math-v2"] and block["language"] == ["en", "fr"]
    assert (block["license"], block["license_name"]) == ("other", "modified-mit")
    for name in (block["base_model"], *block["datasets"]):
        hub.utils.validate_repo_id(name)


BLEND = {
    "calibration": {
        "rows": 46, "tokens": 10_858, "longest": 512, "sha256": "da" * 32,
        "provenance": {"blend": "nemotron-v3", "members": [
            {"name": "math", "dataset": "nvidia/Math-v2", "revision": "8e79", "taken_rows": 40,
             "num_tokens": 10_000},
            {"name": "/home/ann/rows.jsonl", "dataset": None, "revision": None, "taken_rows": 6,
             "num_tokens": 858},
        ]},
    }
}  # fmt: skip


def test_calibration_names_the_blend_and_its_sources_and_no_folder(tmp_path: Path) -> None:
    facts = replace(checkpoint(), made_of={**checkpoint().made_of, **BLEND})
    card = render_card(replace(given(tmp_path), checkpoint=facts))
    section = card.split("### Calibration data")[1].split("\n## ")[0].split("\n### ")[0]
    assert "Blend `nemotron-v3`: 46 samples" in section
    linked = "[nvidia/Math-v2](https://huggingface.co/datasets/nvidia/Math-v2)"
    assert f"| {linked} | 8e79 | 40 | 10000 |" in section
    assert "ann" not in section and "| 6 | 858 |" in section


def test_a_card_says_what_the_reference_card_says(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "small-nvfp4", layers=6, vision=True)
    folder = tmp_path / "small-nvfp4"
    shutil.copy(TEKKEN, folder)
    (folder / "generation_config.json").write_text('{"temperature": 0.7, "top_p": 0.95}')
    (folder / "LICENSE").write_text("text")
    facts = read_checkpoint(folder)
    given_all = CardInput(facts, [], None, contact="safety@example.com")
    base = find_base(facts, "some/base")
    card = render_card(replace(given_all, base=base, repository="me/small-nvfp4"))
    shards = [load_file(file) for file in folder.glob("*.safetensors")]
    parameters = sum(tensor.numel() for shard in shards for tensor in shard.values())
    assert f"({parameters:,})" in card
    assert "Recommended sampling (generation_config.json): temperature 0.7, top_p 0.95." in card
    assert "[some/base](https://huggingface.co/some/base)" in card
    assert "some did not make this quantization" in card
    assert "safety@example.com" in card and "text and images" in card
    assert metadata(card)["license_link"] == "LICENSE"
    assert "`hf download me/small-nvfp4 --local-dir small-nvfp4`" in card
    command = card.split("With vLLM:")[1].split("```")[1]
    assert command.startswith("sh\nvllm serve me/small-nvfp4 \\\n")
    words = shlex.split(command.removeprefix("sh\n").replace("\\\n", " "))
    assert words[words.index("--served-model-name") + 1] == "small-nvfp4"
    for flag in ("--config-format", "--tokenizer-mode", "--max-model-len", "--tool-call-parser"):
        assert flag in words
    assert str(tmp_path) not in card and findings(card) == []


@pytest.mark.parametrize(
    ("claimed", "origin", "said"),
    [
        ("mistralai/Mistral-Medium-3.5-128B", "", "the name says 128B parameters, this"),
        ("some/model-7b-instruct", "", "the name says 7b"),
        ("other/name", "some/name@0123", "made from some/name@0123"),
        ("no hub id", "", "owner/name was expected"),
    ],
)
def test_a_base_model_that_cannot_be_is_refused(claimed: str, origin: str, said: str) -> None:
    facts = replace(checkpoint(), made_of={"origin": origin} if origin else {})
    with pytest.raises(UsageError, match=said):
        find_base(facts, claimed)


@pytest.mark.parametrize(
    "claimed", ["some/base", "HuggingFaceTB/SmolLM2-135M-Instruct", "a/Mix-8x7B", "a/x-0.1B-v2"]
)
def test_a_base_model_that_may_be_is_stated(claimed: str) -> None:
    # The fixture has the geometry of a model of 135 million parameters.
    base = find_base(checkpoint(), claimed)
    assert base is not None and base.name == claimed and "states" in base.proof


def test_the_manifest_knows_the_base_model(tmp_path: Path) -> None:
    assert find_base(checkpoint(), None) is None
    facts = replace(checkpoint(), made_of={"origin": "some/name@0123abc"})
    base = find_base(facts, None)
    assert base is not None and base.name == "some/name" and "0123abc" in base.proof
    (tmp_path / "config.json").write_text("{}")
    source = {"config.json": {"sha256": hashlib.sha256(b"{}").hexdigest()}}
    facts = replace(checkpoint(), made_of={"source": source})
    base = find_base(facts, "some/name", tmp_path)
    assert base is not None and "compared with a copy" in base.proof
    (tmp_path / "config.json").write_text("{ }")
    with pytest.raises(UsageError, match="is not the one that was quantized"):
        find_base(facts, "some/name", tmp_path)
    with pytest.raises(UsageError, match="No such file"):
        find_base(facts, "some/name", tmp_path / "nowhere")


def test_a_published_card_and_its_records_name_no_place(tmp_path: Path) -> None:
    card = given(tmp_path)
    baseline, mixed = card.arms
    result = replace(
        mixed.run.benchmarks["aime2025"],
        provenance={"source": "team/items", "revision": None, "sha256": {}, "note": ""},
        missing=[["i", 0, "no answer from http://gpu07.corp:8000/v1"]],
    )
    run = replace(
        mixed.run, endpoint="http://gpu07.corp:8000/v1", command="halfbyte evaluate /home/ann/x",
        server={"health": {"engine_directory": "/home/ann/x", "version": "0.1.0"}},
        judge={"url": "http://judge.corp:1", "model": "qwen", "revision": "not stated"},
        benchmarks={"aime2025": result},
    )  # fmt: skip
    remarked = replace(card.comparison, remarks=["see /home/ann/runs"])  # type: ignore[type-var]
    file = write_card(
        tmp_path / "card", replace(card, arms=[baseline, replace(mixed, run=run)],
                                   comparison=remarked),
    )  # fmt: skip
    texts = [path.read_text() for path in file.parent.rglob("*") if path.is_file()]
    assert len(texts) == 4
    for text in texts:
        assert findings(text) == []
        for word in ("gpu07", "corp.", "/ann", "team/"):
            assert word not in text
    assert "judged by qwen (its revision was not stated)" in texts[0] + "".join(texts)
