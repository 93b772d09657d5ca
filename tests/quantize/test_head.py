"""The output head in FP8 and NVFP4: calibrated, encoded, published, read by our own engine."""

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.checkpoint.verify import verify
from halfbyte.checkpoint.writer import OutputInProgress
from halfbyte.errors import FormatError, UsageError
from halfbyte.formats.measure import relative_error
from halfbyte.model.attention import DenseAttend
from halfbyte.model.decoder import Step
from halfbyte.model.linear import Mode
from halfbyte.model.load import load_decoder
from halfbyte.model.parallel import Communicator
from halfbyte.model.tiny import tiny_config, write_tiny_checkpoint
from halfbyte.quantize import layer, steps
from halfbyte.quantize.job import QuantizeConfig
from halfbyte.quantize.page import render
from halfbyte.quantize.pipeline import quantize
from halfbyte.quantize.scales import METHODS
from halfbyte.recipe.plan import format_plan, make_plan, plan_size, plan_sizes
from halfbyte.recipe.schema import Recipe
from hopper import recipe_by_parts
from parallel_ranks import on_ranks
from vllm_rules import require_vllm_reads

DATA = Path(__file__).parents[1] / "data/checkpoint"
LAYERS = 2


def recipe_of(attention: str, mlp: str, head: str, method: str = "max") -> Recipe:
    recipe = recipe_by_parts(attention, mlp, head, samples=8, tokens=64)
    return replace(recipe, scales=METHODS[method])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An FP8 checkpoint with a head of its own, and token rows beside it."""
    root = tmp_path_factory.mktemp("source")
    write_tiny_checkpoint(root / "fp8", layers=LAYERS, dialect="mistral-fp8")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 512, (4, 40), generator=generator)
    save_file({"batch0.input_ids": ids}, root / "tokens.safetensors")
    return root


def run(source: Path, output: Path, recipe: Recipe, **fields: Any) -> Path:
    tokens = source / "tokens.safetensors"
    if recipe.scales.activations != "none":
        fields.setdefault("calibration_tokens", tokens)
    quantize(QuantizeConfig(source / "fp8", output, recipe, **fields))
    return output


@pytest.mark.parametrize(
    "head, method",
    [("fp8", "max"), ("fp8", "none"), *(("nvfp4", method) for method in METHODS)],
)
def test_every_method_publishes_a_sound_head(
    source: Path, tmp_path: Path, head: str, method: str
) -> None:
    out = run(source, tmp_path / "out", recipe_of("nvfp4", "fp8", head, method))
    findings = verify(out, source / "fp8")
    assert findings.is_sound, findings.problems
    assert findings.sqnr_db["head"] > {"fp8": 28, "nvfp4": 16}[head]
    require_vllm_reads(out)
    assert Checkpoint.open(out).format_of("head") == head


@pytest.mark.parametrize("head", ["fp8", "nvfp4"])
def test_our_engine_reads_the_head_as_it_is_stored(source: Path, tmp_path: Path, head: str) -> None:
    """Logits are the bf16 model's but for the head, whose rows are the decoded ones."""
    out = run(source, tmp_path / "out", recipe_of("nvfp4", "fp8", head))
    kept = run(source, tmp_path / "kept", recipe_of("nvfp4", "fp8", "bf16"))
    checkpoint = Checkpoint.open(out)
    step = Step(torch.arange(24), torch.arange(24), DenseAttend([0, 24]))
    logits: dict[str, Tensor] = {}
    modes: tuple[Mode, ...] = ("weight_only", "declared")
    for mode in modes:
        decoder = load_decoder(checkpoint, mode=mode)
        logits[mode], hidden_TD = decoder.forward_with_hidden(step)
        twin = load_decoder(Checkpoint.open(kept), mode=mode)
        assert torch.equal(hidden_TD, twin.forward_with_hidden(step)[1])
        if mode == "weight_only":
            exact = hidden_TD.double() @ checkpoint.decoded("head", torch.float32).double().T
            assert relative_error(exact, logits[mode].double()) < 0.01
            wide = load_decoder(checkpoint, dtype=torch.float32)
            assert relative_error(wide.forward(step), logits[mode]) < 0.05
    lost = relative_error(logits["weight_only"], logits["declared"])
    assert 0.005 < lost < 0.5, "declared rounds what the head reads as well"


@pytest.mark.parametrize("head", ["fp8", "nvfp4"])
def test_ranks_share_the_rows_of_a_quantized_head(source: Path, tmp_path: Path, head: str) -> None:
    checkpoint = Checkpoint.open(run(source, tmp_path / "out", recipe_of("fp8", "fp8", head)))
    x_TD = torch.randn(5, checkpoint.config.text.width).bfloat16()
    whole = load_decoder(checkpoint).logits(x_TD)

    def logits(communicator: Communicator) -> Tensor:
        return load_decoder(checkpoint, communicator=communicator).logits(x_TD)

    assert torch.equal(on_ranks(2, logits)[0], whole)


@pytest.mark.parametrize(
    "case, formats",
    [("all and head nvfp4", ("nvfp4", "nvfp4", "nvfp4")),
     ("all nvfp4, head fp8", ("nvfp4", "nvfp4", "fp8"))],
)  # fmt: skip
def test_a_head_has_the_bytes_that_the_reference_gives_it(
    tmp_path: Path, case: str, formats: tuple[str, str, str]
) -> None:
    """Recorded of Model Optimizer 0.47 on the same twelve layers and tokens."""
    config = tiny_config(layers=12)
    text = replace(
        config.text, width=32, num_heads=2, num_kv_heads=1, head_dim=16, mlp_width=32,
        vocab_size=64, eos_token_ids=(2,),
    )  # fmt: skip
    write_tiny_checkpoint(tmp_path / "fp8", config=replace(config, text=text))
    ids = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(0))
    save_file({"batch0.input_ids": ids}, tmp_path / "tokens.safetensors")
    out = run(tmp_path, tmp_path / "out", recipe_of(*formats))
    recorded = json.loads((DATA / "modelopt-head-bytes.json").read_text())[case]
    stored = load_file(out / "model.safetensors")
    assert {name for name in stored if "lm_head" in name} == set(recorded)
    for name, (dtype, shape, content) in recorded.items():
        tensor = stored[name]
        assert (str(tensor.dtype), list(tensor.shape)) == (dtype, shape)
        if name.endswith("input_scale"):
            # Two forward passes differ in bf16 steps; behind twelve layers of random weights in
            # some more than docs/reference/formats.md#what-equal-means says of one linear.
            assert float(tensor) == pytest.approx(content, rel=2**-5)
        elif tensor.numel() == 1:
            assert float(tensor) == content
        else:
            raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
            assert hashlib.sha256(raw).hexdigest() == content, name


def test_rows_encoded_in_parts_are_those_of_the_whole(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for method in ("max", "weighted"):
        recipe = recipe_of("fp8", "fp8", "nvfp4", method)
        whole = run(source, tmp_path / f"{method}-whole", recipe)
        with monkeypatch.context() as patch:
            patch.setattr(layer, "HEAD_ROWS", 100)
            parts = run(source, tmp_path / f"{method}-parts", recipe)
        a, b = (load_file(folder / "model.safetensors") for folder in (whole, parts))
        for name in a:
            assert torch.equal(
                a[name].reshape(-1).view(torch.uint8), b[name].reshape(-1).view(torch.uint8)
            ), (method, name)


class _KilledError(BaseException):
    """Stands for a signal: nothing catches it."""


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("method", ["gptq", "none"])
def test_a_run_that_died_at_the_head_goes_on_there(
    source: Path, tmp_path: Path, when: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of("fp8", "fp8", "nvfp4", method)
    whole = run(source, tmp_path / "whole", recipe)

    def die(*_: Any) -> None:
        raise _KilledError

    with monkeypatch.context() as patch:
        if when == "before":
            patch.setattr(steps, "quantize_head", die)
        else:
            patch.setattr(OutputInProgress, "publish", die)
        with pytest.raises(_KilledError):
            run(source, tmp_path / "out", recipe)
    done: list[int] = []
    config = QuantizeConfig(
        source / "fp8",
        tmp_path / "out",
        recipe,
        calibration_tokens=None if method == "none" else source / "tokens.safetensors",
    )
    result = quantize(config, lambda layer, _: done.append(layer))
    assert done == []
    assert [x["name"] for x in result.record["linears"]][-1] == "head"
    a, b = (load_file(folder / "model.safetensors") for folder in (whole, tmp_path / "out"))
    assert all(
        torch.equal(a[n].reshape(-1).view(torch.uint8), b[n].reshape(-1).view(torch.uint8))
        for n in a
    )
    # The page shows layers by projection, and counts the head among its format's linears.
    linears = [x for x in result.record["linears"] if x["format"] == "nvfp4"]
    assert f"<td>nvfp4</td><td>{len(linears)}</td>" in re.sub(
        r"<td[^>]*>", "<td>", render(result.record)
    )


def test_a_tied_head_stays_bf16_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tiny_checkpoint(tmp_path / "fp8", layers=2, tied_head=True)
    ids = torch.randint(0, 512, (2, 20), generator=torch.Generator().manual_seed(0))
    save_file({"batch0.input_ids": ids}, tmp_path / "tokens.safetensors")
    out = run(tmp_path, tmp_path / "out", recipe_of("fp8", "nvfp4", "nvfp4"))
    assert "head of this model is its embedding (tied), which stays in bf16" in caplog.text
    assert verify(out, tmp_path / "fp8").is_sound
    assert Checkpoint.open(out).format_of("head") == "bf16"


def test_a_head_is_claimed_once() -> None:
    config = tiny_config(layers=LAYERS)
    recipe = recipe_of("fp8", "fp8", "nvfp4")
    with pytest.raises(UsageError, match="rule 3 claims the head, which the recipe names under ke"):
        make_plan(replace(recipe, keep=recipe.keep | {"head"}), config)
    twice = replace(recipe, rules=(*recipe.rules, recipe.rules[-1]))
    with pytest.raises(UsageError, match="rule 4 overlaps rule 3: both claim head"):
        make_plan(twice, config)
    with pytest.raises(UsageError, match="says nothing about head"):
        make_plan(replace(recipe, rules=recipe.rules[:2]), config)
    odd = replace(config, text=replace(config.text, width=24))
    with pytest.raises(FormatError, match="head: 24 input features; NVFP4 needs a multiple of 16"):
        make_plan(replace(recipe, rules=(*recipe_of("fp8", "fp8", "nvfp4").rules,)), odd)


@pytest.mark.parametrize("head", ["bf16", "fp8", "nvfp4"])
def test_the_plan_says_what_a_head_weighs(source: Path, tmp_path: Path, head: str) -> None:
    config = tiny_config(layers=LAYERS)
    recipe = recipe_of("fp8", "nvfp4", head)
    plan = make_plan(recipe, config)
    out = run(source, tmp_path / "out", recipe, with_errors=False)
    checkpoint = Checkpoint.open(out)
    assert plan_size(plan, config).num_bytes == sum(map(checkpoint.num_bytes, checkpoint.names()))
    assert plan_size(plan, config).num_tensors == len(checkpoint.names())
    shown = format_plan(plan, config)
    assert ("\nhead " in shown) == (head != "bf16")
    assert ("embedding, head" in shown) == (head == "bf16")
    total = sum(size.num_bytes for size in plan_sizes(plan, config).values())
    assert f"{total:,}" in shown
