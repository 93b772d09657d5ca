"""Blend files are read strictly, and the seven public data sets are what the reference says."""

from pathlib import Path

import pytest

from halfbyte.calibrate.blend import (
    Source,
    known_datasets,
    library_blends,
    load_blend,
    parse_blend,
    resolve_dataset,
)
from halfbyte.errors import UsageError


@pytest.mark.parametrize("name", library_blends())
def test_every_blend_of_the_library_loads(name: str) -> None:
    assert load_blend(name).name == name


def test_the_seven_members_stand_in_the_order_of_the_reference() -> None:
    blend = load_blend("nemotron-v3")
    ids = [resolve_dataset(source, "x").id for source in blend.sources]
    assert ids == [
        "nvidia/Nemotron-SFT-Instruction-Following-Chat-v2",
        "nvidia/Nemotron-Science-v1",
        "nvidia/Nemotron-Competitive-Programming-v1",
        "nvidia/Nemotron-SFT-Agentic-v2",
        "nvidia/Nemotron-Math-v2",
        "nvidia/Nemotron-SFT-SWE-v2",
        "nvidia/Nemotron-SFT-Multilingual-v1",
    ]
    assert [len(dataset.splits) for dataset in known_datasets().values()] == [1, 2, 4, 1, 5, 1, 18]
    assert (blend.samples, blend.tokens_per_sample) == (1024, 512)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "mapping"),
        ("a: [", "is not valid YAML"),
        ("name: a\nname: b\nsources: [{builtin: true}]", "'name' occurs twice"),
        ("name: a\nsources: []", "at least 1"),
        ("name: a\nsources: [{builtin: true}]\nsampels: 3", "sampels"),
        ("name: a\nsources: [{builtin: true}]\nsamples: 0", "samples"),
        ("name: a\nsources: [{builtin: true}]\nsamples: '9'", "samples"),
        ("name: a\nsources: [{builtin: true}]\nmode: chat", "mode"),
        ("name: a\nsources: [{builtin: true, weight: 0}]", "weight"),
        ("name: a\nsources: [{builtin: true, weight: .nan}]", "weight"),
        ("name: a\nsources: [{}]", "exactly one"),
        ("name: a\nsources: [{path: x, builtin: true}]", "exactly one"),
        ("name: a\nsources: [{path: x, splits: [a]}]", "belong to a dataset"),
        ("name: a\nsources: [{path: x}, {path: x}]", "two sources"),
        ("name: a\nsources: [{dataset: maths}]", "is not one of"),
        ("name: a\nsources: [{dataset: o/n}]", "needs its splits"),
        ("name: a\nsources: [{dataset: math-v2, splits: [high]}]", "no split high"),
        (
            "name: a\nsources: [{dataset: sft-agentic-v2, splits: [tool_calling]}]",
            "line 1095 is not valid JSON",
        ),
        ("name: a\nfolder: /\nsources: [{builtin: true}]", "mapping"),
    ],
)
def test_a_mistake_in_a_blend_is_named(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_blend(text, "mine.yaml")


def test_a_source_may_narrow_splits_and_move_the_pin() -> None:
    source = Source(dataset="math-v2", splits=["low"], revision="abc")
    dataset = resolve_dataset(source, "x")
    assert (dataset.splits, dataset.revision) == (["low"], "abc")


def test_an_unknown_name_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nemotron-v3"):
        load_blend("nemotron")
    with pytest.raises(UsageError, match="cannot be read"):
        load_blend(tmp_path / "none.yaml")
