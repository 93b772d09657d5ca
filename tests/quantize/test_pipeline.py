"""Whole runs on a tiny model: what comes out, what is refused, what a dead run leaves."""

import errno
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfbyte.calibrate.budget import OverBudgetError
from halfbyte.calibrate.stream import TAPS
from halfbyte.checkpoint.identity import MANIFEST_NAME
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.checkpoint.verify import verify
from halfbyte.checkpoint.writer import OutputInProgress, ShardWriter
from halfbyte.errors import CapacityError, FormatError, HalfbyteError, UsageError
from halfbyte.log import logger
from halfbyte.model.load import load_layer
from halfbyte.model.tiny import tiny_config, write_tiny_checkpoint
from halfbyte.modules import decoder_linears
from halfbyte.quantize.export import export_tensors
from halfbyte.quantize.job import QuantizeConfig
from halfbyte.quantize.methods import JUDGED
from halfbyte.quantize.pipeline import quantize
from halfbyte.quantize.scales import METHODS
from halfbyte.quantize.staging import work_directory
from halfbyte.recipe.plan import make_plan
from halfbyte.recipe.schema import load_recipe

RECIPE = load_recipe("medium-3.5")
LAYERS = 6


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny") / "fp8"
    write_tiny_checkpoint(directory, layers=LAYERS, vision=True, dialect="mistral-fp8")
    (directory / "tokenizer.json").write_text("{}")
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "params.json").write_text("{}")
    return directory


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 20), (1, 33), (3, 5))
    batches = {
        f"batch{i}.input_ids": torch.randint(0, 512, shape, generator=generator)
        for i, shape in enumerate(shapes)
    }
    save_file(batches, path)
    return path


def hashes(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir()}


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v for p in directory.glob("*.safetensors") for k, v in load_file(p).items()}


def left_behind(output: Path) -> list[str]:
    """Names beside the output, the output included."""
    return sorted(path.name for path in output.parent.iterdir())


def test_a_strict_reader_accepts_the_export(source: Path, tokens: Path, tmp_path: Path) -> None:
    config = QuantizeConfig(
        source, tmp_path / "out", RECIPE, calibration_tokens=tokens, max_shard_bytes=400_000
    )
    seen: list[tuple[int, int]] = []
    result = quantize(config, lambda done, total: seen.append((done, total)))
    assert seen == [(n + 1, LAYERS) for n in range(LAYERS)]
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path / "out")
    assert after.quantization.kv_cache == "fp8"
    assert after.layout == before.layout
    for name in before.names():
        if not name.startswith("decoder.") or name.endswith("norm.weight"):
            assert torch.equal(before.tensor(name), after.tensor(name)), name
    assert [record["name"] for record in result.linears] == [
        linear.name for linear in decoder_linears(before.config)
    ]
    assert result.num_calibration_tokens == 20 * 2 + 33 + 15
    files = {path.name for path in (tmp_path / "out").iterdir() if path.suffix != ".safetensors"}
    assert files == {
        "config.json",
        "hf_quant_config.json",
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "preprocessor_config.json",
        "model.safetensors.index.json",
        MANIFEST_NAME,
    }
    assert left_behind(tmp_path / "out") == ["out"]


def test_the_manifest_proves_every_tensor(source: Path, tokens: Path, tmp_path: Path) -> None:
    quantize(QuantizeConfig(source, tmp_path / "out", RECIPE, calibration_tokens=tokens))
    manifest = json.loads((tmp_path / "out" / MANIFEST_NAME).read_text())
    tensors = tensors_of(tmp_path / "out")
    assert manifest["tensors"].keys() == tensors.keys()
    for name, tensor in tensors.items():
        content = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert manifest["tensors"][name] == hashlib.sha256(content).hexdigest()
    for name, digest in manifest["files"].items():
        assert hashes(tmp_path / "out")[name] == digest
    made_of = manifest["made_of"]
    assert made_of["calibration"]["tokens"] == 88
    assert made_of["recipe"]["name"] == "medium-3.5"
    assert str(source) not in json.dumps(manifest)


def test_the_record_holds_times_memory_and_ranges_of_every_layer(
    source: Path, tokens: Path, tmp_path: Path
) -> None:
    config = QuantizeConfig(source, tmp_path / "out", RECIPE, calibration_tokens=tokens)
    killed_run(config, 3)
    record: Any = quantize(config).record
    assert json.loads(json.dumps(record)) == record
    assert [layer["layer"] for layer in record["layers"]] == list(range(LAYERS))
    for layer in record["layers"]:
        assert layer["observed"].keys() == set(TAPS) and min(layer["observed"].values()) > 0
        assert min(layer["seconds"].values()) >= 0 < layer["peak_memory_bytes"]["host"]
    assert [linear["name"] for linear in record["linears"]] == [
        linear.name for linear in decoder_linears(Checkpoint.open(source).config)
    ]
    # Every method is judged on every linear, whichever was chosen.
    for linear in record["linears"]:
        assert linear["output_db"].keys() == set(JUDGED)
        assert (15 if linear["format"] == "nvfp4" else 25) < linear["output_db"]["max"] < 45
    assert sum(x["output_db"]["mse"] > x["output_db"]["max"] for x in record["linears"]) >= 2
    # Block scales rounded down to e4m3 cut some of their largest weights.
    clipped = {linear["name"]: linear["clipped"] for linear in record["linears"]}
    assert 0 < clipped["decoder.4.mlp.up"] < 0.1 and clipped["decoder.4.attention.q"] == 0
    assert record["calibration"]["tokens"] == 88 and record["output"]["bytes"] > 0
    assert str(tmp_path) not in json.dumps(record)


def test_equal_runs_give_equal_bytes_whatever_the_budget(
    source: Path, tokens: Path, tmp_path: Path
) -> None:
    config = QuantizeConfig(source, tmp_path / "a", RECIPE, calibration_tokens=tokens)
    quantize(config)
    quantize(replace(config, output=tmp_path / "b", memory_bytes=1 << 40, with_errors=False))
    quantize(replace(config, output=tmp_path / "c", memory_bytes=840 << 20))
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b") == hashes(tmp_path / "c")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_a_sound_checkpoint_of_the_same_layout(
    source: Path, tokens: Path, tmp_path: Path, method: str
) -> None:
    recipe = replace(RECIPE, scales=METHODS[method])
    needs_data = method != "none"
    config = QuantizeConfig(
        source, tmp_path / "out", recipe, calibration_tokens=tokens if needs_data else None
    )
    result = quantize(config)
    assert len(result.linears) == 7 * LAYERS
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert checkpoint.quantization.formats["decoder.4.mlp.up"] == "nvfp4"
    report = verify(tmp_path / "out", against=source)
    assert report.is_sound, report.problems
    wanted = export_tensors(Checkpoint.open(source), make_plan(RECIPE, checkpoint.config))
    found = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    assert {name: (tuple(t.shape), t.dtype) for name, t in found.items()} == wanted
    for name in ("config.json", "hf_quant_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text())  # what they say is verify's
    made_of = json.loads((tmp_path / "out" / MANIFEST_NAME).read_text())["made_of"]
    assert made_of["recipe"]["scales"] == METHODS[method].facts()
    for gate in (name for name in found if name.endswith("gate.tensor_scale")):
        assert torch.equal(found[gate], found[gate.replace("gate", "up")])
        roles = (
            gate.replace("tensor_scale", "input_scale"),
            gate.replace("gate.tensor", "up.input"),
        )
        assert torch.equal(*(found[role] for role in roles))


def test_smoothing_moves_powers_of_two_from_norms_to_what_reads_them(
    source: Path, tokens: Path, tmp_path: Path
) -> None:
    recipe = replace(RECIPE, scales=replace(METHODS["smooth"], smoothing=1.0))
    quantize(QuantizeConfig(source, tmp_path / "out", recipe, calibration_tokens=tokens))
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path / "out")
    moved = 0
    for layer in range(LAYERS):
        for norm in ("attention_norm", "mlp_norm"):
            name = f"decoder.{layer}.{norm}.weight"
            ratio = before.tensor(name).float() / after.tensor(name).float()
            assert bool((torch.frexp(ratio).mantissa == 0.5).all())
            is_read_in_nvfp4 = norm == "mlp_norm" and 4 <= layer < LAYERS - 1
            assert is_read_in_nvfp4 or bool((ratio == 1).all())
            moved += int((ratio != 1).sum())
            if is_read_in_nvfp4:
                theirs = before.decoded(f"decoder.{layer}.mlp.up", torch.float32) * ratio
                ours = after.decoded(f"decoder.{layer}.mlp.up", torch.float32)
                assert float((theirs - ours).norm() / theirs.norm()) < 0.15
    assert moved
    assert verify(tmp_path / "out", against=source).is_sound


def test_a_norm_that_moved_alone_is_no_smoothing(
    source: Path, tokens: Path, tmp_path: Path
) -> None:
    recipe = replace(RECIPE, scales=METHODS["smooth"])
    quantize(QuantizeConfig(source, tmp_path / "out", recipe, calibration_tokens=tokens))
    (file,) = (tmp_path / "out").glob("*.safetensors")
    good = load_file(file)
    norms = {
        layer: next(n for n in good if f"layers.{layer}.post_attention" in n) for layer in (2, 4)
    }

    def problems(**changes: torch.Tensor) -> str:
        save_file(good | {norms[int(k[1:])]: v for k, v in changes.items()}, file, {"format": "pt"})
        found = verify(tmp_path / "out", against=source).problems
        return " ".join(str(p) for p in found if "manifest" not in p.what)

    # Its readers do not say the inverse; it is no power of two; it is read by FP8 linears.
    assert "codes" in problems(_4=good[norms[4]] * 2)
    assert "passes through" in problems(_4=good[norms[4]] * 1.5)
    assert "passes through" in problems(_2=good[norms[2]] * 2)


def test_the_cache_may_have_constant_scales_beside_measured_inputs(
    source: Path, tokens: Path, tmp_path: Path
) -> None:
    scales = replace(RECIPE.scales, cache="constant")
    for name, recipe in (("measured", RECIPE), ("constant", replace(RECIPE, scales=scales))):
        quantize(QuantizeConfig(source, tmp_path / name, recipe, calibration_tokens=tokens))
    measured, constant = (tensors_of(tmp_path / name) for name in ("measured", "constant"))
    for name, tensor in measured.items():
        if name.endswith((".k_scale", ".v_scale")):
            assert float(constant[name]) == 1.0 != float(tensor)
        else:
            assert constant[name].float().equal(tensor.float()), name


def test_searched_scales_lose_less_than_maxima(source: Path, tokens: Path, tmp_path: Path) -> None:
    lost = {}
    for method in ("max", "mse"):
        recipe = replace(RECIPE, scales=METHODS[method])
        config = QuantizeConfig(source, tmp_path / method, recipe, calibration_tokens=tokens)
        lost[method] = [
            record["sqnr_db"] or math.inf
            for record in quantize(config).linears
            if record["format"] == "nvfp4"
        ]
    assert all(mse > amax for mse, amax in zip(lost["mse"], lost["max"], strict=True))


@pytest.mark.parametrize(
    "change, said",
    [
        ({"output": "exists"}, "exists"),
        ({"source": "absent"}, "no such directory"),
        ({"calibration_tokens": "absent"}, "cannot be read"),
        ({"blend": "builtin"}, "not both"),
        ({"blend": "nothing", "calibration_tokens": None}, "no blend 'nothing'"),
        ({"recipe": replace(RECIPE, scales=METHODS["none"])}, "takes no calibration data"),
        ({"memory_bytes": 1 << 20}, "one decoder layer takes"),
        ({"gpu_memory_bytes": 1 << 30}, "--gpu-memory needs --device cuda"),
        ({"device": "abacus"}, "device 'abacus'"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(
    source: Path, tokens: Path, tmp_path: Path, change: dict[str, object], said: str
) -> None:
    (tmp_path / "exists").mkdir()
    (tmp_path / "exists" / "something").touch()
    paths = {
        k: tmp_path / v if isinstance(v, str) and k not in ("blend", "device") else v
        for k, v in change.items()
    }
    config = QuantizeConfig(source, tmp_path / "out", RECIPE, calibration_tokens=tokens)
    with pytest.raises(HalfbyteError, match=said):
        quantize(replace(config, **paths))  # type: ignore[arg-type]
    assert left_behind(tmp_path / "out") == ["exists"]


def test_an_export_is_not_quantized_again(source: Path, tokens: Path, tmp_path: Path) -> None:
    quantize(QuantizeConfig(source, tmp_path / "out", RECIPE, calibration_tokens=tokens))
    config = QuantizeConfig(tmp_path / "out", tmp_path / "two", RECIPE, calibration_tokens=tokens)
    with pytest.raises(UsageError, match="already a Model Optimizer export"):
        quantize(config)


def test_a_width_that_nvfp4_cannot_hold_is_refused(tokens: Path, tmp_path: Path) -> None:
    config = tiny_config(layers=LAYERS)
    odd = replace(config, text=replace(config.text, mlp_width=200))
    write_tiny_checkpoint(tmp_path / "odd", config=odd)
    job = QuantizeConfig(tmp_path / "odd", tmp_path / "out", RECIPE, calibration_tokens=tokens)
    with pytest.raises(FormatError, match=r"decoder\.4\.mlp\.down: 200 input features"):
        quantize(job)
    assert left_behind(tmp_path / "out") == ["odd"]


@pytest.mark.parametrize("value, said", [(torch.nan, "NaN"), (0.0, "all weights are zero")])
@pytest.mark.parametrize("method", ["max", "none"])
def test_broken_weights_leave_nothing(
    tokens: Path, tmp_path: Path, value: float, said: str, method: str
) -> None:
    write_tiny_checkpoint(tmp_path / "whole", layers=LAYERS)
    whole = Checkpoint.open(tmp_path / "whole")
    shapes = {whole.foreign(name): (whole.shape(name), whole.dtype(name)) for name in whole.names()}
    with ShardWriter(tmp_path / "broken", shapes) as writer:
        for name in whole.names():
            tensor = whole.tensor(name)
            if name == "decoder.4.mlp.up.weight":
                tensor.fill_(value)
            writer.add(whole.foreign(name), tensor)
        writer.copy_file(tmp_path / "whole" / "config.json")
        writer.finish()
    config = QuantizeConfig(
        tmp_path / "broken",
        tmp_path / "out",
        replace(RECIPE, scales=METHODS[method]),
        calibration_tokens=tokens if method == "max" else None,
    )
    with pytest.raises(FormatError, match=rf"decoder\.4.*{said}"):
        quantize(config)
    assert left_behind(tmp_path / "out") == ["broken", "whole"]


def test_a_disk_that_is_too_small_is_refused_at_once(
    source: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = QuantizeConfig(source, tmp_path / "out", RECIPE, calibration_tokens=tokens)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(CapacityError, match=r"1\.0 kB free.* take [0-9.]+ MB"):
        quantize(config)
    assert left_behind(tmp_path / "out") == []


@pytest.mark.parametrize("syncs", [14, 15, 16, 17, 18, 19, 20])
def test_a_disk_that_fills_up_costs_the_layer_in_work(
    source: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, syncs: int
) -> None:
    config = QuantizeConfig(source, tmp_path / "out", RECIPE, calibration_tokens=tokens)
    quantize(replace(config, output=tmp_path / "straight"))
    sync, calls = os.fsync, iter(range(1000))

    def fail_later(handle: int) -> None:
        if next(calls) > syncs:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    monkeypatch.setattr(os, "fsync", fail_later)
    with pytest.raises(CapacityError, match=r"disk full.*make room and run again"):
        quantize(config)
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    assert work_directory(tmp_path / "out").exists()
    done: list[int] = []
    quantize(config, lambda layer, _: done.append(layer))
    assert 0 < len(done) < LAYERS
    assert hashes(tmp_path / "out") == hashes(tmp_path / "straight")
    assert left_behind(tmp_path / "out") == ["out", "straight"]


def test_a_full_gpu_keeps_what_is_done_and_says_what_was_planned(
    source: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = QuantizeConfig(source, tmp_path / "out", RECIPE, calibration_tokens=tokens)
    load, calls = load_layer, iter(range(1000))

    def full_later(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return load(*args, **kwargs)

    monkeypatch.setattr("halfbyte.calibrate.stream.load_layer", full_later)
    with pytest.raises(CapacityError, match=r"the GPU is full.*finished layers are kept"):
        quantize(replace(config, memory_bytes=1 << 40))
    done: list[int] = []
    quantize(config, lambda layer, _: done.append(layer))
    assert len(done) == LAYERS - 2


def out_of_memory(
    monkeypatch: pytest.MonkeyPatch, layers: set[int], error: Exception, times: int
) -> None:
    """Loading these layers fails so many times each."""
    load, left = load_layer, dict.fromkeys(layers, times)

    def refused(checkpoint: Checkpoint, layer: int, **options: Any) -> Any:
        if left.get(layer):
            left[layer] -= 1
            raise error
        return load(checkpoint, layer, **options)

    monkeypatch.setattr("halfbyte.calibrate.stream.load_layer", refused)


REFUSED = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")


@pytest.mark.parametrize("error", [REFUSED, MemoryError(), OverBudgetError("--memory 1 GiB: full")])
def test_a_run_that_comes_to_the_end_of_its_memory_goes_on_once_by_itself(
    source: Path,
    tokens: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    config = QuantizeConfig(
        source, tmp_path / "out", RECIPE, calibration_tokens=tokens, memory_bytes=1 << 40
    )
    quantize(replace(config, output=tmp_path / "straight"))
    # Twice: a prefetched layer that has no room is loaded when its turn comes.
    out_of_memory(monkeypatch, {2}, error, times=2)
    done: list[int] = []
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level("WARNING", logger.name)
    quantize(config, lambda layer, _: done.append(layer))
    assert done == [1, 2, 3, 4, 5, 6]
    assert "going on after 3 finished steps" in caplog.text
    assert hashes(tmp_path / "out") == hashes(tmp_path / "straight")
    assert left_behind(tmp_path / "out") == ["out", "straight"]


def test_a_run_whose_memory_ends_twice_keeps_what_is_done_and_says_what_to_do(
    source: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = QuantizeConfig(
        source, tmp_path / "out", RECIPE, calibration_tokens=tokens, memory_bytes=1 << 40
    )
    quantize(replace(config, output=tmp_path / "straight"))
    out_of_memory(monkeypatch, {2}, REFUSED, times=3)
    with pytest.raises(CapacityError) as caught:
        quantize(config)
    said = str(caught.value)
    assert "--memory 1024.00 GiB: the system refuses more, with nothing in memory besides" in said
    assert "give it more, or rows shorter than 33 tokens; 3 finished steps are kept in" in said
    assert left_behind(tmp_path / "out") == [".out.halfbyte-work", "straight"]
    done: list[int] = []
    quantize(config, lambda layer, _: done.append(layer))
    assert done == [3, 4, 5, 6]
    assert hashes(tmp_path / "out") == hashes(tmp_path / "straight")


class _KilledError(BaseException):
    """Stands for a signal: nothing catches it."""


def killed_run(config: QuantizeConfig, after_layer: int) -> None:
    def kill(layer: int, _: int) -> None:
        if layer == after_layer:
            raise _KilledError

    with pytest.raises(_KilledError):
        quantize(config, kill)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"profile": "cuda"}, 'profile was "ieee", is "cuda"'),
        ({"recipe": load_recipe("fp8")}, "recipe.name was"),
        ({"recipe": replace(RECIPE, scales=METHODS["mse"])}, "recipe.scales.weights was"),
        ({"max_shard_bytes": 10**6}, "max_shard_bytes was"),
        ({"calibration_tokens": "fewer"}, "calibration.rows was 6, is 1"),
        ({"source": "other"}, r"source.model.safetensors.sha256 was"),
    ],
)
def test_a_changed_job_does_not_go_on_with_the_old_one(
    source: Path, tokens: Path, tmp_path: Path, change: dict[str, object], said: str
) -> None:
    config = QuantizeConfig(source, tmp_path / "out", RECIPE, calibration_tokens=tokens)
    killed_run(config, 2)
    save_file({"batch0.input_ids": torch.ones(1, 3, dtype=torch.int64)}, tmp_path / "fewer")
    write_tiny_checkpoint(
        tmp_path / "other", layers=LAYERS, vision=True, dialect="mistral-fp8", seed=1
    )
    paths = {
        k: tmp_path / v if isinstance(v, str) and k in ("source", "calibration_tokens") else v
        for k, v in change.items()
    }
    changed = replace(config, **paths)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="unfinished run") as caught:
        quantize(changed)
    assert said in str(caught.value)
    quantize(replace(changed, restart=True))
    assert Checkpoint.open(tmp_path / "out")


@pytest.mark.parametrize("method", ["max", "gptq-smooth"])
def test_a_killed_run_goes_on_after_its_last_layer(
    source: Path, tokens: Path, tmp_path: Path, method: str
) -> None:
    recipe = replace(RECIPE, scales=METHODS[method])
    config = QuantizeConfig(source, tmp_path / "out", recipe, calibration_tokens=tokens)
    quantize(replace(config, output=tmp_path / "straight"))
    for layer in range(1, LAYERS + 1):
        killed_run(config, layer)
        work = work_directory(config.output)
        assert len((work / "journal").read_bytes().splitlines()) == 2 + layer
    done: list[int] = []
    quantize(config, lambda layer, _: done.append(layer))
    assert done == []
    assert hashes(tmp_path / "out") == hashes(tmp_path / "straight")


def test_a_run_that_died_after_publishing_leaves_nothing_to_go_on_with(
    source: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = QuantizeConfig(source, tmp_path / "out", RECIPE, calibration_tokens=tokens)

    def killed(_: OutputInProgress) -> None:
        raise _KilledError

    monkeypatch.setattr(OutputInProgress, "discard", killed)
    with pytest.raises(_KilledError):
        quantize(config)
    monkeypatch.undo()
    first = hashes(tmp_path / "out")
    assert work_directory(config.output).exists()
    shutil.rmtree(config.output)
    quantize(config)
    assert hashes(tmp_path / "out") == first
    assert left_behind(tmp_path / "out") == ["out"]


# Imports once, then forks a run for every kill: starting Python each time would take minutes.
# One thread, since a pool of threads does not survive a fork.
_CRASHES = """
import os, random, shutil, signal, sys, time
import torch
torch.set_num_threads(1)
from pathlib import Path
from halfbyte.quantize.job import QuantizeConfig
from halfbyte.quantize.pipeline import quantize
from halfbyte.recipe.schema import load_recipe
source, straight, output, tokens = map(Path, sys.argv[1:5])

def run(target, kill_after_s=None):
    child = os.fork()
    if child == 0:
        job = QuantizeConfig(source, target, load_recipe("medium-3.5"), calibration_tokens=tokens)
        try:
            quantize(job)
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]

def content(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}

started = time.perf_counter()
assert run(straight) == 0
whole_s = time.perf_counter() - started
moments, killed = random.Random(20), 0
while killed < int(sys.argv[5]):
    status = run(output, moments.uniform(0, whole_s / 2))
    assert status in (0, signal.SIGKILL), status
    killed += status != 0
    if output.exists():
        assert content(output) == content(straight)
        shutil.rmtree(output)
assert run(output) == 0
assert content(output) == content(straight)
print("same bytes after", killed, "kills")
"""


@pytest.mark.parametrize("kills", [5, pytest.param(30, marks=pytest.mark.slow)])
def test_kills_at_random_moments_change_no_byte(
    source: Path, tokens: Path, tmp_path: Path, kills: int
) -> None:
    places = [source, tmp_path / "straight", tmp_path / "out", tokens]
    done = subprocess.run(
        [sys.executable, "-c", _CRASHES, *map(str, places), str(kills)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == f"same bytes after {kills} kills\n", done.stdout + done.stderr
    assert left_behind(tmp_path / "out") == ["out", "straight"]
