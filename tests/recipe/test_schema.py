import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from halfbyte.errors import UsageError
from halfbyte.recipe.schema import (
    Calibration,
    GptqOptions,
    LayerRange,
    Rule,
    Scales,
    library_recipes,
    load_recipe,
    parse_recipe,
)
from halfbyte.recipe.strict_yaml import parse_yaml


def raw(**changes: Any) -> str:
    """A valid recipe as YAML, with top-level keys changed; `...` removes one."""
    fields = {
        "name": "test",
        "rules": [
            {"part": "decoder", "group": "attention", "format": "fp8"},
            {"part": "decoder", "group": "mlp", "format": "nvfp4"},
        ],
        "keep": ["embedding", "head", "vision", "projector"],
        "kv_cache": "fp8",
        "scales": {"weights": "amax", "activations": "amax"},
        "calibration": {"blend": "builtin", "samples": 8, "tokens_per_sample": 64, "seed": 0},
    } | changes
    return yaml.safe_dump({key: value for key, value in fields.items() if value is not ...})


def with_rule(**changes: Any) -> str:
    rule = {"part": "decoder", "group": "mlp", "format": "fp8"} | changes
    return raw(rules=[{key: value for key, value in rule.items() if value is not ...}])


def layers_of(value: Any) -> tuple[LayerRange, ...] | None:
    return parse_recipe(with_rule(layers=value), "x.yaml").rules[0].layers


def test_the_library() -> None:
    assert library_recipes() == ("fp8", "medium-3.5", "mixed", "nvfp4-everywhere")
    recipe = load_recipe("medium-3.5")
    assert recipe.name == "medium-3.5" and recipe.kv_cache == "fp8"
    assert recipe.rules[1] == Rule(
        "mlp", ("gate", "up", "down"), (LayerRange(0, 3), LayerRange(-1, -1)), "fp8"
    )
    assert recipe.rules[2].layers == (LayerRange(4, -2),)
    assert recipe.scales == Scales("amax", "amax")
    for name in library_recipes():
        assert load_recipe(name).name == name


def test_a_file_by_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(raw())
    recipe = load_recipe(path)
    assert recipe.source == "mine.yaml"
    assert recipe.calibration == Calibration("builtin", 8, 64, 0)
    assert recipe.keep == {"embedding", "head", "vision", "projector"}


@pytest.mark.parametrize(
    ("written", "ranges"),
    [
        (3, [(3, 3)]),
        (-1, [(-1, -1)]),
        ("0-3", [(0, 3)]),
        (["0-3", -1], [(0, 3), (-1, -1)]),
        (["4..-2"], [(4, -2)]),
        (["-3..-1", 0], [(-3, -1), (0, 0)]),
        (["12..20"], [(12, 20)]),
    ],
)
def test_ways_to_write_layers(written: Any, ranges: list[tuple[int, int]]) -> None:
    assert layers_of(written) == tuple(LayerRange(*pair) for pair in ranges)


@pytest.mark.parametrize("written", ["a", "1-", "-1-3", "1...3", 1.5, True, None, "0-3,5", [[1]]])
def test_layers_that_mean_nothing_are_explained(written: Any) -> None:
    with pytest.raises(UsageError, match=r"recipe x\.yaml, rule 1: .* is not a layer; write 3, -1"):
        layers_of(written)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (raw(extra=1), r"recipe x\.yaml: unknown key extra; there are name"),
        (raw(keep=...), r"recipe x\.yaml lacks keep"),
        (raw(rules=[]), "rules must be a list"),
        (raw(rules={"a": 1}), "rules must be a list"),
        (raw(name=""), "name must be a word"),
        (raw(keep=["decoder"]), "keep: 'decoder' is not one of embedding"),
        (raw(keep="head"), "keep must be a list"),
        (raw(kv_cache="int8"), "kv_cache: 'int8' is not one of bf16, fp8"),
        (raw(scales={"weights": "amax"}), "scales lacks activations"),
        (raw(scales={"weights": "guess", "activations": "amax"}), "'guess' is not one of amax"),
        (
            raw(scales={"weights": "amax", "activations": "amax", "cache": "two"}),
            "cache: 'two' is not one of measured, constant",
        ),
        (raw(calibration={"blend": "b", "samples": 0, "tokens_per_sample": 1, "seed": 0}),
         "calibration: samples must be a whole number of at least 1"),
        (raw(calibration={"blend": "b", "samples": True, "tokens_per_sample": 1, "seed": 0}),
         "samples must be a whole number"),
        (raw(calibration={"blend": 3, "samples": 1, "tokens_per_sample": 1, "seed": 0}),
         "blend must be a name"),
        (with_rule(part="encoder"), "rule 1: part .encoder.: only the decoder and the head"),
        (with_rule(group="moe"), "rule 1, group: 'moe' is not one of attention, mlp"),
        (with_rule(format="int4"), "rule 1, format: 'int4' is not one of bf16, fp8, nvfp4"),
        (with_rule(format=...), "rule 1 lacks format"),
        (with_rule(when="always"), "rule 1: unknown key when"),
        (with_rule(layers=[]), "rule 1: layers is empty"),
        (with_rule(linears=["q"]), "rule 1: mlp has no linear 'q', only gate, up, down"),
        (with_rule(linears=[]), "linears must be a list"),
        ("- a\n- b\n", "a mapping with name, rules"),
        ("name: [", "is not valid YAML"),
        ("name: a\nname: b\n", "is not valid YAML: .*'name' occurs twice"),
        ("!!python/object/apply:os.system ['true']", "is not valid YAML"),
        (raw(rules=["fp8"]), "rule 1: a mapping with part"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_recipe(text, "x.yaml")


def test_no_such_recipe(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no recipe 'medium'; there are fp8, medium-3\.5"):
        load_recipe("medium")
    with pytest.raises(UsageError, match="cannot be read"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot be read"):
        load_recipe(tmp_path / "binary.yaml")


# Ten lists, each of nine times the one before: a billion letters to whoever prints the last.
BOMB = "[&l0 [x, x, x], " + ", ".join(
    f"&l{n} [" + ", ".join([f"*l{n - 1}"] * 9) + "]" for n in range(1, 10)
) + "]"  # fmt: skip
HOSTILE = {
    "keep of nested aliases": ("keep: [embedding, head]", f"keep: {BOMB}"),
    "a part of nested aliases": ("part: decoder", f"part: {BOMB}"),
    "a format of nested aliases": ("format: fp8", f"format: {BOMB}"),
    "a group of nested aliases": ("group: attention", f"group: {BOMB}"),
    "a cache of nested aliases": ("kv_cache: fp8", f"kv_cache: {BOMB}"),
    "layers of nested aliases": ("layers: [0]", f"layers: [{BOMB}]"),
    "linears of nested aliases": ("linears: [q]", f"linears: [{BOMB}]"),
    "samples of many digits": ("samples: 8", f"samples: {'7' * 90_000}"),
    "samples in hexadecimal": ("samples: 8", f"samples: 0x{'7' * 90_000}"),
    "a layer of many digits": ("layers: [0]", f"layers: [{'7' * 90_000}]"),
    "a key of many letters": ("kv_cache: fp8", f"{'k' * 90_000}: fp8"),
    "a key that is a list": ("kv_cache: fp8", "? [1, 2]\n: fp8"),
    "a list in itself": ("keep: [embedding, head]", "keep: &me [*me]"),
    "a date that is none": ("samples: 8", "samples: 2026-99-99"),
}
SMALL = """
name: small
rules: [{part: decoder, group: attention, linears: [q], layers: [0], format: fp8}]
keep: [embedding, head]
kv_cache: fp8
scales: {weights: amax, activations: amax}
calibration: {blend: builtin, samples: 8, tokens_per_sample: 8, seed: 0}
"""


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_yaml_is_one_short_sentence(what: str) -> None:
    """Read, refused and printed in no time, whatever the text stands for."""
    old, new = HOSTILE[what]
    assert parse_recipe(SMALL, "x.yaml").name == "small" and SMALL.count(old) == 1
    with pytest.raises(UsageError) as caught:
        parse_recipe(SMALL.replace(old, new), "x.yaml")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("value", "said"), [("[[[]]]", r"\[\[\[\]\]\]"), ("&a [*a]", r"\[\[\[\.\.\.\]\]\]")]
)
def test_a_value_from_outside_is_shown_short(value: str, said: str) -> None:
    with pytest.raises(UsageError, match=f"kv_cache: {said} is not one of"):
        parse_recipe(SMALL.replace("kv_cache: fp8", f"kv_cache: {value}"), "x.yaml")


def test_a_recipe_is_a_small_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.yaml")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "large.yaml").write_text("#" * 300_000)
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9\n")
    (tmp_path / "pointer.yaml").write_text("version https://git-lfs.github.com/spec/v1\n")
    for name, said in (
        ("fifo", "is a FIFO"),
        ("folder", "is a directory"),
        ("large", "more than the 200.0 kB"),
        ("latin", "is not UTF-8"),
        ("pointer", "Git LFS pointer"),
        ("absent", "No such file"),
    ):
        with pytest.raises(UsageError, match=f"{name}.yaml: cannot be read .*{said}"):
            load_recipe(tmp_path / f"{name}.yaml")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("name: x\nrules: [}\n", 2),
        ("name: x\nrules:\n  - {part: decoder\nkeep: []\n", 4),
        ("name: x\n\tkeep: []\n", 2),
        ("name: x\nkeep: []\nname: y\n", 3),
        ("? {a: b}\n: c\n? [d]\n: e\n", 1),
        ("a: 1\nb: *nowhere\n", 2),
        ('a: "open\n\nb: 2\n', 4),
    ],
)
def test_what_is_no_yaml_is_found_by_its_line(text: str, line: int) -> None:
    with pytest.raises(
        UsageError, match=r"^recipe x.yaml is not valid YAML: line " rf"{line}, column \d+: "
    ):
        parse_yaml(text, "recipe x.yaml")


def scales_of(text: str) -> Scales:
    return parse_recipe(raw(scales=parse_yaml(text, "scales")), "x.yaml").scales


def test_options_of_gptq_and_smoothing_have_defaults() -> None:
    assert scales_of("{weights: gptq, activations: headroom}").gptq == GptqOptions()
    found = scales_of(
        "{weights: gptq, activations: amax, smoothing: 0.5, "
        "gptq: {damping: 0.05, order: columns, block: 64, sweeps: 0}}"
    )
    assert found.gptq == GptqOptions(0.05, "columns", 64, 0) and found.smoothing == 0.5
    assert found.facts()["gptq"] == {"damping": 0.05, "order": "columns", "block": 64, "sweeps": 0}
    # What has no effect is not said: manifests of other methods stay as they were.
    plain = scales_of("{weights: amax, activations: amax}").facts()
    assert plain == {"weights": "amax", "activations": "amax", "cache": "measured"}


@pytest.mark.parametrize(
    "text, said",
    [
        ("{weights: mse, activations: amax, gptq: {damping: 1}}", "gptq has options, but weights"),
        ("{weights: gptq, activations: none}", "weights: gptq needs calibration data"),
        ("{weights: weighted, activations: none}", "weights: weighted needs calibration data"),
        ("{weights: amax, activations: none, smoothing: 0.4}", "smoothing needs calibration data"),
        ("{weights: amax, activations: amax, smoothing: 2}", "2 is not a number from 0 to 1"),
        ("{weights: amax, activations: amax, smoothing: yes}", "is not a number"),
        ("{weights: gptq, activations: amax, gptq: {block: 24}}", "24 is not a multiple of 16"),
        ("{weights: gptq, activations: amax, gptq: {sweeps: -1}}", "not a whole number from 0"),
        ("{weights: gptq, activations: amax, gptq: {damping: .nan}}", "is not a number from 0"),
        ("{weights: gptq, activations: amax, gptq: {order: size}}", "columns, energy"),
        ("{weights: gptq, activations: amax, gptq: {seed: 1}}", "unknown key seed"),
        ("{weights: gptq, activations: amax, gptq: 3}", "a mapping with"),
    ],
)
def test_options_that_cannot_be_are_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        scales_of(text)
