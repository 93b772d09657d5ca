"""What formats cost, measured layer by layer: against the costs themselves, and across kills."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from halfbyte.calibrate.backward import run_backward, run_head_backward
from halfbyte.calibrate.stream import READERS
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.errors import CheckpointError, UsageError
from halfbyte.model.attention import DenseAttend
from halfbyte.model.load import load_layer
from halfbyte.model.rope import RotaryTable
from halfbyte.model.tiny import write_tiny_checkpoint
from halfbyte.quantize import sensitivity
from halfbyte.quantize.groups import Group, groups_of, unmeasured_groups
from halfbyte.quantize.sensitivity import Measuring, measure_sensitivity, some_rows

LAYERS = 2


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("source")
    write_tiny_checkpoint(root / "fp8", layers=LAYERS, dialect="mistral-fp8")
    write_tiny_checkpoint(root / "tied", layers=LAYERS, tied_head=True)
    ids = torch.randint(0, 512, (3, 24), generator=torch.Generator().manual_seed(0))
    save_file({"batch0.input_ids": ids}, root / "tokens.safetensors")
    return root


def rows(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 512, (20 + n,), generator=generator) for n in range(count)]


def measuring(source: Path, file: Path, **fields: Any) -> Measuring:
    checkpoint = Checkpoint.open(source / "fp8")
    return Measuring(checkpoint, rows(), {"text": 1}, {"source": 1}, file, **fields)


def test_the_layer_with_gradients_is_the_layer_that_serves(source: Path) -> None:
    """Same output as `DecoderLayer`, and the gradient that finite differences give."""
    checkpoint = Checkpoint.open(source / "tied")
    text = checkpoint.config.text
    x_TD = torch.randn(9, text.width, generator=torch.Generator().manual_seed(2)).bfloat16()
    weights = {
        short: checkpoint.decoded(f"decoder.1.{short}", torch.float32)
        for readers in READERS.values()
        for short in readers
    }
    for norm in ("attention_norm", "mlp_norm"):
        weights[norm] = checkpoint.tensor(f"decoder.1.{norm}.weight").float()
    rotation = RotaryTable(text).at(torch.arange(9))
    after_TD = torch.randn(9, text.width, generator=torch.Generator().manual_seed(3))
    wide_TD = x_TD.float()
    passed = run_backward(text, weights, wide_TD, after_TD, rotation)

    def output(y_TD: Tensor) -> Tensor:
        found = run_backward(text, weights, y_TD, after_TD, rotation)
        o, down = found.outputs["attention.o"], found.outputs["mlp.down"]
        return y_TD + o + down

    served_TD = load_layer(checkpoint, 1)(x_TD, 1, DenseAttend([0, 9]), rotation)
    assert torch.allclose(output(wide_TD), served_TD.float(), atol=0.05, rtol=0.05)
    step_TD = torch.randn(9, text.width, generator=torch.Generator().manual_seed(4)) * 1e-3
    change = (output(wide_TD + step_TD) - output(wide_TD - step_TD)) * after_TD
    assert float(change.sum()) / 2 == pytest.approx(
        float((passed.before_TD * step_TD).sum()), rel=1e-2, abs=1e-5
    )


def test_drawn_gradients_have_the_fisher_information_of_the_head(source: Path) -> None:
    """Over many draws, (g . d)^2 / 2 is the divergence that a small step d causes."""
    checkpoint = Checkpoint.open(source / "tied")
    text = checkpoint.config.text
    head_VD, norm_D = checkpoint.tensor("embedding.weight").float() / 8, torch.ones(text.width)
    x_TD = torch.randn(1, text.width, generator=torch.Generator().manual_seed(5))
    many_TD = x_TD.expand(4000, -1)
    step_D = torch.randn(text.width, generator=torch.Generator().manual_seed(6)) * 0.02
    found = run_head_backward(text, norm_D, head_VD, many_TD, torch.Generator().manual_seed(7))
    estimate = float((found.before_TD @ step_D).square().mean() / 2)

    def logs(y_TD: Tensor) -> Tensor:
        normed_TD = y_TD * torch.rsqrt(y_TD.square().mean(-1, keepdim=True) + text.norm_eps)
        return torch.log_softmax(F.linear(normed_TD, head_VD), -1).double()

    before_TV, after_TV = logs(x_TD), logs(x_TD + step_D)
    exact = float((before_TV.exp() * (before_TV - after_TV)).sum())
    assert estimate == pytest.approx(exact, rel=0.1)


def test_groups_and_their_formats(source: Path) -> None:
    fp8, tied = Checkpoint.open(source / "fp8"), Checkpoint.open(source / "tied")
    groups = groups_of(fp8.config)
    assert [len(members) for members in groups] == [3, 1, 2, 1] * LAYERS + [1]
    assert groups[-1] == ("head",) and groups_of(tied.config)[-1] != ("head",)
    # An FP8 source is FP8 at best; its head, in bf16, may stay so.
    of_fp8, of_tied = (
        {group.members: tuple(group.sizes) for group in unmeasured_groups(c.config, c.quantization)}
        for c in (fp8, tied)
    )
    assert of_fp8[groups[0]] == ("fp8", "nvfp4")
    assert of_fp8["head",] == ("bf16", "fp8", "nvfp4")
    assert of_tied[groups[0]] == ("bf16", "fp8", "nvfp4")
    named = Group(groups[0], {}, {})
    assert named.name == "decoder.0.attention.q,k,v"
    assert Group(("head",), {}, {}).name == "head"


def losses(groups: list[Group]) -> dict[str, dict[Any, float]]:
    return {group.name: dict(group.losses) for group in groups}


def test_a_measurement_that_died_goes_on_and_finds_the_same(source: Path, tmp_path: Path) -> None:
    class KilledError(BaseException):
        pass

    whole = losses(measure_sensitivity(measuring(source, tmp_path / "whole.json")))
    for group, of in whole.items():
        assert of["nvfp4"] > of["fp8"] >= 0, group
    assert whole["head"]["bf16"] == 0
    steps = 2 * LAYERS + 1
    for last in range(1, steps + 1):
        file = tmp_path / f"{last}.json"

        def kill(done: int, total: int, last: int = last) -> None:
            assert total == steps
            if done == last:
                raise KilledError

        with pytest.raises(KilledError):
            measure_sensitivity(measuring(source, file), on_step=kill)
        assert not file.exists()
        taken: list[int] = []

        def note(done: int, _: int, taken: list[int] = taken) -> None:
            taken.append(done)

        again = measure_sensitivity(measuring(source, file), on_step=note)
        assert losses(again) == whole
        assert taken == list(range(last + 1, steps + 1))
        assert [path.name for path in tmp_path.glob(".*")] == []


def test_a_file_is_taken_again_only_for_the_same(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "x.json"
    first = losses(measure_sensitivity(measuring(source, file)))

    def never(*_: Any) -> None:
        raise AssertionError("measured again")

    with monkeypatch.context() as patch:
        patch.setattr(sensitivity, "run_backward", never)
        assert losses(measure_sensitivity(measuring(source, file))) == first
        with pytest.raises(AssertionError, match="measured again"):
            measure_sensitivity(measuring(source, file, mode="weight_only"))
    # What that one left is of another mode, and says so.
    with pytest.raises(UsageError, match=r"made otherwise: text\.text was 1, is 2"):
        measure_sensitivity(replace(measuring(source, file), made={"text": 2}))
    assert losses(measure_sensitivity(measuring(source, file, restart=True))) == first
    file.write_text('{"halfbyte_sensitivity": 99}')
    with pytest.raises(CheckpointError, match="is no sensitivity of ours"):
        measure_sensitivity(measuring(source, file))


def test_some_rows_are_spread_and_no_longer_than_asked() -> None:
    many = [torch.full((100,), n) for n in range(50)]
    some = some_rows(many, 450)
    assert sum(map(len, some)) == 450
    assert [int(row[0]) for row in some] == [0, 11, 22, 33, 44]
    assert [len(row) for row in some_rows(many[:2], 1000)] == [100, 100]
