"""Corruptions planted one by one; each must be found, with and without what makes it easy."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from golden_models import MODELS
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.checkpoint.verify import check_rope, verify
from halfbyte.checkpoint.writer import ShardWriter
from halfbyte.checkpoint.written_metadata import hub_config
from halfbyte.cli.main import main
from halfbyte.config import ModelConfig, RopeConfig, TextConfig
from halfbyte.errors import CheckpointError
from halfbyte.formats.fp8 import encode_fp8, fp8_scale
from halfbyte.formats.nvfp4 import encode_nvfp4, encode_nvfp4_with, nvfp4_tensor_scale
from halfbyte.modules import decoder_linears

LAYERS = "model.language_model.layers"
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def pristine(make: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `source` (bf16), `export` without a manifest, `signed` with one."""
    root = tmp_path_factory.mktemp("pristine")
    make.checkpoint(root / "source")
    make.checkpoint(root / "export", "modelopt")
    for name in ("source", "export"):
        (root / name / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "b": 63}}}')
    tensors = load_file(root / "export/model.safetensors")
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    with ShardWriter(root / "signed", shapes) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        for name in ("config.json", "hf_quant_config.json", "tokenizer.json"):
            writer.copy_file(root / "export" / name)
        writer.finish()
    return root


@pytest.fixture
def copy(pristine: Path, tmp_path: Path) -> Path:
    shutil.copytree(pristine, tmp_path / "copy")
    return tmp_path / "copy"


def change_tensors(directory: Path, change: Callable[[Tensors], object]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def texts(directory: Path, against: Path | None = None) -> str:
    return "\n".join(map(str, verify(directory, against).problems))


def test_a_good_export_has_no_problems(make: Any, pristine: Path) -> None:
    for name in ("export", "signed"):
        report = verify(pristine / name, pristine / "source")
        assert report.problems == () and report.is_sound
        assert set(report.sqnr_db) == {linear.name for linear in decoder_linears(make.full)}
    assert report.num_hashes == report.num_tensors
    nvfp4 = [value for name, value in report.sqnr_db.items() if name.startswith("decoder.4.mlp")]
    assert len(nvfp4) == 3 and all(18 < value < 24 for value in nvfp4)
    assert verify(pristine / "source", pristine / "source").problems == ()


def flip(name: str, index: int, mask: int) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name].view(torch.uint8).view(-1)[index] ^= mask

    return change


def scale(name: str, factor: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] = tensors[name] * factor

    return change


def swap(first: str, second: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[first], tensors[second] = tensors[second], tensors[first]

    return change


def zero(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] = torch.zeros_like(tensors[name])

    return change


def put_nan(tensors: Tensors) -> None:
    tensors[f"{LAYERS}.1.input_layernorm.weight"][3] = torch.nan


Q, GATE = f"{LAYERS}.2.self_attn.q_proj", f"{LAYERS}.4.mlp.gate_proj"
UP, DOWN = f"{LAYERS}.4.mlp.up_proj", f"{LAYERS}.4.mlp.down_proj"

# name -> (what is done to the tensors, the tensor that must be named, seen without the source?)
PLANTED: dict[str, tuple[Callable[[Tensors], None], str, bool]] = {
    "flipped byte in FP8 codes": (flip(f"{Q}.weight", 77, 0x20), f"{Q}.weight", False),
    "flipped sign in FP8 codes": (flip(f"{Q}.weight", 5, 0x80), f"{Q}.weight", False),
    "flipped byte in NVFP4 codes": (flip(f"{DOWN}.weight", 40, 0x44), f"{DOWN}.weight", False),
    "swapped nibbles": (
        lambda t: t.update({f"{DOWN}.weight": t[f"{DOWN}.weight"] >> 4 | t[f"{DOWN}.weight"] << 4}),
        f"{DOWN}.weight", False,
    ),
    "flipped byte in block scales": (
        flip(f"{UP}.weight_scale", 9, 0x08), f"{UP}.weight", False,
    ),
    "negative block scale": (flip(f"{UP}.weight_scale", 9, 0x80), f"{UP}.weight_scale", True),
    "flipped byte in the head": (flip("lm_head.weight", 100, 0x01), "lm_head.weight", False),
    "flipped byte in the vision tower": (
        flip("model.vision_tower.patch_conv.weight", 8, 0x10),
        "model.vision_tower.patch_conv.weight", False,
    ),
    "swapped FP8 scales": (
        swap(f"{Q}.weight_scale", f"{LAYERS}.2.self_attn.o_proj.weight_scale"),
        f"{Q}.weight", False,
    ),
    "half-size FP8 scale": (scale(f"{Q}.weight_scale", 0.5), f"{Q}.weight", False),
    "half-size tensor scale": (scale(f"{DOWN}.weight_scale_2", 0.5), f"{DOWN}.weight", False),
    "half-size tensor scale of one fused partner": (
        scale(f"{GATE}.weight_scale_2", 0.5), f"{GATE}.weight_scale_2", True,
    ),
    "half-size input scale of one fused partner": (
        scale(f"{Q}.input_scale", 0.5), f"{Q}.input_scale", True,
    ),
    "negative scale": (scale(f"{DOWN}.input_scale", -1), f"{DOWN}.input_scale", True),
    "infinite KV scale": (
        scale(f"{LAYERS}.0.self_attn.k_proj.k_scale", float("inf")),
        f"{LAYERS}.0.self_attn.k_proj.k_scale", True,
    ),
    "zero KV scale": (
        zero(f"{LAYERS}.0.self_attn.v_proj.v_scale"), f"{LAYERS}.0.self_attn.v_proj.v_scale", True,
    ),
    "zero FP8 weight": (zero(f"{Q}.weight"), f"{Q}.weight", True),
    "zero NVFP4 weight": (zero(f"{DOWN}.weight"), f"{DOWN}.weight", True),
    "zero block scales": (zero(f"{DOWN}.weight_scale"), f"{DOWN}.weight_scale", True),
    "zero norm": (
        zero("model.language_model.norm.weight"), "model.language_model.norm.weight", True,
    ),
    "NaN in a norm": (put_nan, f"{LAYERS}.1.input_layernorm.weight", True),
    "NaN code": (
        lambda t: t[f"{Q}.weight"].view(torch.uint8).view(-1).__setitem__(3, 0x7F),
        f"{Q}.weight", True,
    ),
    "wrong layer's FP8 scale": (
        swap(f"{Q}.weight_scale", f"{LAYERS}.3.self_attn.q_proj.weight_scale"),
        f"{Q}.weight", False,
    ),
    "wrong linear's block scales": (
        swap(f"{GATE}.weight_scale", f"{UP}.weight_scale"), f"{GATE}.weight", False,
    ),
    "wrong layer's weight": (
        swap(f"{Q}.weight", f"{LAYERS}.3.self_attn.q_proj.weight"), f"{Q}.weight", False,
    ),
    "wrong layer's norm": (
        swap(f"{LAYERS}.1.input_layernorm.weight", f"{LAYERS}.2.input_layernorm.weight"),
        f"{LAYERS}.1.input_layernorm.weight", False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", PLANTED)
def test_planted_corruption_is_found_and_named(copy: Path, what: str) -> None:
    change, named, alone = PLANTED[what]
    change_tensors(copy / "export", change)
    assert f"error: {named}: " in texts(copy / "export", copy / "source")
    if alone:
        assert f"error: {named}: " in texts(copy / "export")


@pytest.mark.parametrize("what", PLANTED)
def test_the_manifest_finds_it_without_the_source(copy: Path, what: str) -> None:
    change, _, _ = PLANTED[what]
    before = load_file(copy / "signed/model.safetensors")
    change_tensors(copy / "signed", change)
    after = load_file(copy / "signed/model.safetensors")
    found = texts(copy / "signed")
    for name, tensor in before.items():
        same = tensor.reshape(-1).view(torch.uint8).equal(after[name].reshape(-1).view(torch.uint8))
        assert same or f"error: {name}: its bytes are not those" in found


@pytest.mark.parametrize("role", ["weight_scale_2", "input_scale"])
def test_a_small_swap_hides_from_nothing_but_the_manifest(copy: Path, role: str) -> None:
    """A scalar off by less than rounding leaves no trace in the values; the hash sees it."""
    change_tensors(copy / "signed", scale(f"{DOWN}.{role}", 1.0001))
    assert f"{DOWN}.{role}: its bytes" in texts(copy / "signed", copy / "source")


def test_a_missing_fused_partner(make: Any, copy: Path) -> None:
    for name in ("config.json", "hf_quant_config.json"):
        path = copy / "export" / name
        raw = json.loads(path.read_text())
        stated = raw.get("quantization_config") or raw["quantization"]
        del stated["quantized_layers"][UP]
        path.write_text(json.dumps(raw))
    plain = make.weights(make.full)["decoder.4.mlp.up.weight"]

    def unquantize(tensors: Tensors) -> None:
        for role in ("weight_scale", "weight_scale_2", "input_scale"):
            del tensors[f"{UP}.{role}"]
        tensors[f"{UP}.weight"] = plain

    # Without its tensors changed the checkpoint does not even open.
    assert "no place in the model" in texts(copy / "export")
    change_tensors(copy / "export", unquantize)
    assert "fused partners in different formats: decoder.4.mlp.gate nvfp4" in texts(copy / "export")


def test_what_cannot_be_opened_is_one_problem(copy: Path) -> None:
    change_tensors(copy / "export", lambda t: t.pop(f"{Q}.weight"))
    problems = verify(copy / "export", copy / "source").problems
    assert len(problems) == 1 and f"missing: {Q}.weight" in problems[0].what
    with pytest.raises(CheckpointError):
        verify(copy / "signed", copy / "nothing")


def without_data(path: Path, name: str) -> None:
    """Take a tensor's bytes out of a file and leave its entry, as a meta tensor would be saved."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    start, stop = header[name]["data_offsets"]
    for key, entry in header.items():
        if key != "__metadata__":
            entry["data_offsets"] = [
                offset - (stop - start) if offset >= stop else offset
                for offset in entry["data_offsets"]
            ]
    header[name]["data_offsets"] = [start, start]
    text = json.dumps(header).encode()
    data = content[8 + length :]
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[:start] + data[stop:])


@pytest.mark.parametrize("name", [f"{Q}.weight", f"{DOWN}.weight_scale", f"{Q}.input_scale"])
def test_a_meta_tensor_without_data(copy: Path, name: str) -> None:
    without_data(copy / "export/model.safetensors", name)
    assert name in texts(copy / "export") and "error" in texts(copy / "export")


def shard(make: Any, directory: Path) -> Path:
    make.checkpoint(directory, "modelopt", shards=2)
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    sizes = [t.nbytes for n in (1, 2) for t in load_file(
        directory / f"model-0000{n}-of-00002.safetensors").values()]  # fmt: skip
    index["metadata"]["total_size"] = sum(sizes)
    path.write_text(json.dumps(index))
    return path


def test_a_stale_index(make: Any, tmp_path: Path) -> None:
    path = shard(make, tmp_path)
    assert verify(tmp_path).is_sound
    index = json.loads(path.read_text())
    index["metadata"]["total_size"] += 2
    path.write_text(json.dumps(index))
    assert "error: model.safetensors.index.json: total_size is" in texts(tmp_path)
    moved = dict(index["weight_map"])
    moved["lm_head.weight"] = next(s for s in moved.values() if s != moved["lm_head.weight"])
    path.write_text(json.dumps({**index, "weight_map": moved}))
    assert "lm_head.weight" in texts(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda q: q["config_groups"]["group_0"]["targets"].pop(),
            "config_groups: the tensors ask",
        ),
        (lambda q: q.update(ignore=["lm_head"]), "quantization_config: ignore: the tensors ask"),
        (lambda q: q["config_groups"].pop("group_1"), "config_groups"),
    ],
)
def test_metadata_that_does_not_follow_from_the_tensors(
    copy: Path, edit: Any, change: Any, message: str
) -> None:
    edit(copy / "export/config.json", lambda raw: change(raw["quantization_config"]))
    assert message in texts(copy / "export")


def test_files_that_mislead_an_engine(copy: Path, edit: Any) -> None:
    export = copy / "export"
    (export / "params.json").write_text("{}")
    (export / "consolidated.safetensors").write_bytes(b"")
    assert "error: params.json: with consolidated" in texts(export)
    (export / "hf_quant_config.json").unlink()
    edit(export / "config.json", lambda raw: raw.pop("tie_word_embeddings"))
    found = texts(export)
    assert "warning: hf_quant_config.json: missing" in found
    assert "warning: config.json: no tie_word_embeddings" in found
    shutil.copy(copy / "signed/hf_quant_config.json", export)
    edit(export / "config.json", lambda raw: raw.pop("quantization_config"))
    assert "error: config.json: no quantization_config" in texts(export)


def test_tokenizers_that_do_not_match(copy: Path) -> None:
    export = copy / "export"
    (export / "tokenizer.json").write_text('{"model": {"vocab": {"a": 64}}}')
    found = texts(export, copy / "source")
    assert "error: tokenizer.json: has token 64, the embedding ends at 63" in found
    assert "error: tokenizer.json: is not the source's" in found
    (export / "tokenizer.json").write_text("{")
    assert "error" in texts(export) and "tokenizer.json is not JSON" in texts(export)
    (export / "tokenizer.json").unlink()
    assert "the source has it, this checkpoint does not" in texts(export, copy / "source")
    assert "warning" in texts(export) and "no tokenizer.json" in texts(export)


def test_a_file_changed_after_publishing(copy: Path) -> None:
    (copy / "signed/tokenizer.json").write_text('{"model": {}}')
    assert "error: tokenizer.json: was changed after halfbyte-manifest.json" in texts(
        copy / "signed"
    )
    (copy / "signed/tokenizer.json").unlink()
    assert "halfbyte-manifest.json names it, but it is not there" in texts(copy / "signed")
    (copy / "signed/halfbyte-manifest.json").write_text("[]")
    assert "a JSON object was expected" in texts(copy / "signed")


def test_another_models_source(make: Any, copy: Path, tmp_path: Path) -> None:
    config = replace(make.full, text=replace(make.text, norm_eps=1e-6))
    make.checkpoint(tmp_path / "other", config=config)
    assert "error: config.json: text:" in texts(copy / "export", tmp_path / "other")


MEDIUM = TextConfig(
    88, 12288, 96, 8, 128, 28672, 131072, 1e-5, 262144,
    RopeConfig(1e6, "yarn", 64.0, 4096, 4.0, 1.0, 1.0, 1.0, 0.0), False, 1, (2,), 11,
)  # fmt: skip


def test_the_yarn_mistake_of_medium_3_5_is_refused_with_the_reason() -> None:
    problems = list(check_rope(ModelConfig(MEDIUM, None)))
    assert [problem.severity for problem in problems] == ["error"]
    assert "geometry of Mistral Medium 3.5" in problems[0].what and "1.416" in problems[0].what
    corrected = replace(MEDIUM, rope=replace(MEDIUM.rope, mscale_all_dim=0.0))
    assert not list(check_rope(ModelConfig(corrected, None)))
    # Other models of the class rightly carry 1.
    assert not list(check_rope(ModelConfig(replace(MEDIUM, num_layers=40, width=5120), None)))


def test_a_context_longer_than_yarn_reaches_is_a_warning(make: Any) -> None:
    long = replace(make.text, max_positions=500_000)
    assert [p.severity for p in check_rope(ModelConfig(long, None))] == ["warning"]


def test_the_command_answers_with_its_exit_code(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["verify", str(copy / "signed"), "--against", str(copy / "source")]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "hashes compared" in out and "median" in out and out.endswith("sound\n")
    change_tensors(copy / "signed", flip(f"{Q}.weight", 0, 0x80))
    assert main(arguments) == 1
    assert f"error: {Q}.weight: its bytes are not" in capsys.readouterr().out


def test_an_fp8_source_against_its_bf16(make: Any, tmp_path: Path) -> None:
    make.checkpoint(tmp_path / "bf16")
    for layout in ("hf", "mistral"):
        make.checkpoint(tmp_path / layout, "mistral-fp8", layout)
        report = verify(tmp_path / layout, tmp_path / "bf16")
        assert report.is_sound, report.problems
        assert min(report.sqnr_db.values()) > 30
    assert hub_config(make.full)


@pytest.mark.parametrize("model", MODELS)
def test_the_references_exports_are_sound(golden_model: Callable[[str], Path], model: str) -> None:
    report = verify(golden_model(model) / "export", golden_model(model) / "source")
    assert report.is_sound, report.problems


def reencoded(linear: str, foreign: str, factor: float, original: Tensor) -> Tensors:
    """The tensors of a weight under a scale that is off, every code rightly rounded."""
    if ".mlp." in linear:
        right = encode_nvfp4(original, nvfp4_tensor_scale(original.abs().amax()))
        scales = (right.scale_OB.float() / factor).clamp(2.0**-9).to(torch.float8_e4m3fn)
        wrong = encode_nvfp4_with(original, scales, right.tensor_scale)
        return {f"{foreign}.weight": wrong.codes_OI2, f"{foreign}.weight_scale": wrong.scale_OB}
    scale = fp8_scale(original.abs().amax()) / factor
    codes = encode_fp8(original, scale)
    return {f"{foreign}.weight": codes, f"{foreign}.weight_scale": scale}


@pytest.mark.parametrize(
    ("linear", "foreign"), [("decoder.2.attention.q", Q), ("decoder.4.mlp.down", DOWN)]
)
@pytest.mark.parametrize("factor", [4.0, 8.0])
def test_a_scale_that_clips_is_told_by_its_decibels(
    make: Any, copy: Path, linear: str, foreign: str, factor: float
) -> None:
    """Every code is the nearest under the stored scale; that the scale is too small, only the
    distance as a whole can tell.
    """
    original = make.weights(make.full)[f"{linear}.weight"]
    wrong = reencoded(linear, foreign, factor, original)
    before = load_file(copy / "export/model.safetensors")
    wrong = {name: tensor.to(before[name].dtype) for name, tensor in wrong.items()}
    if ".mlp." in linear:
        scale = before[f"{foreign}.weight_scale_2"]
        assert float(scale) == float(nvfp4_tensor_scale(original.abs().amax()))
    change_tensors(copy / "export", lambda tensors: tensors.update(wrong))
    report = verify(copy / "export", copy / "source")
    assert [p.where for p in report.problems] == [f"{foreign}.weight"]
    what = report.problems[0].what
    found = re.match(
        r"(-?[0-9.]+) dB from the source; (fp8 gives 25|nvfp4 gives 15) at least", what
    )
    assert found is not None, what
    assert report.sqnr_db[linear] == pytest.approx(float(found[1]), abs=0.06)
    assert not report.is_sound


@pytest.mark.parametrize("short", ["self_attn.q_proj", "mlp.down_proj"])
def test_a_whole_linear_of_another_layer_is_told_by_its_decibels(copy: Path, short: str) -> None:
    """Weight and scales together: the checkpoint is consistent in itself, and wrong."""
    first, second = (f"{LAYERS}.{layer}.{short}" for layer in (1, 2))

    def exchange(tensors: Tensors) -> None:
        for role in ("weight", "weight_scale"):
            swap(f"{first}.{role}", f"{second}.{role}")(tensors)

    change_tensors(copy / "export", exchange)
    found = texts(copy / "export", copy / "source")
    for name in (first, second):
        assert re.search(rf"error: {re.escape(name)}\.weight: -?[0-9.]+ dB from the source", found)
    assert verify(copy / "export").is_sound


def test_a_fused_group_is_reported_once(copy: Path) -> None:
    change_tensors(copy / "export", scale(f"{UP}.input_scale", 2.0))
    problems = verify(copy / "export").problems
    assert [(p.severity, p.where) for p in problems] == [("error", f"{GATE}.input_scale")]


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_a_native_source_of_plain_rope_and_its_hub_copy_mean_the_same(
    make: Any, tmp_path: Path, beta: float
) -> None:
    """The hub's config of a native source states a length that the native one has not."""
    length = 64 if beta else 0
    rope = RopeConfig(1e6, original_max_positions=length, llama_4_scaling_beta=beta)
    config = ModelConfig(replace(make.text, rope=rope), make.vision)
    make.checkpoint(tmp_path / "native", "mistral-fp8", "mistral", config=config)
    native = Checkpoint.open(tmp_path / "native")
    make.checkpoint(tmp_path / "hub", "mistral-fp8", "hf", config=native.config)
    assert verify(tmp_path / "hub", tmp_path / "native").is_sound
    other = replace(native.config.text, rope=replace(rope, theta=1e5))
    make.checkpoint(tmp_path / "other", "mistral-fp8", "hf", config=replace(config, text=other))
    assert "is not the source's" in texts(tmp_path / "other", tmp_path / "native")
