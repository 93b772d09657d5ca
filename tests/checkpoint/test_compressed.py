"""FP8 as llm-compressor writes it: read strictly, computed with each token's own scale."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cuda_plain import plain_logits
from halfbyte.checkpoint.compressed_fields import compressed_facts
from halfbyte.checkpoint.overview import overview
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.checkpoint.verify import verify
from halfbyte.errors import CheckpointError, FormatError, UsageError
from halfbyte.model.attention import DenseAttend
from halfbyte.model.cuda.load import load_cuda_weights
from halfbyte.model.cuda.weights import layer_linears
from halfbyte.model.decoder import Step
from halfbyte.model.load import load_decoder
from halfbyte.model.rope import RotaryTable
from halfbyte.model.tiny import tiny_config, write_tiny_checkpoint
from halfbyte.quantize.job import refuse_export
from hopper import compressed_config, hopper_config, write_compressed

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("compressed") / "bf16"
    write_tiny_checkpoint(directory, config=hopper_config(layers=2))
    return directory


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("channel", [True, False])
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("kv", [True, False])
def test_every_layout_of_it_is_read(
    channel: bool, dynamic: bool, kv: bool, bf16: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "c"
    write_compressed(directory, bf16, channel=channel, dynamic=dynamic, kv=kv)
    checkpoint, source = Checkpoint.open(directory), Checkpoint.open(bf16)
    assert checkpoint.quantization.dialect == "compressed"
    assert set(checkpoint.quantization.formats.values()) == {"fp8"}
    assert checkpoint.format_of("head") == "bf16"
    assert checkpoint.quantization.kv_cache == ("fp8" if kv else "bf16")
    assert "llm-compressor" in overview(checkpoint)
    for name in ("decoder.0.attention.k", "decoder.1.mlp.down"):
        shape = (checkpoint.shape(f"{name}.weight")[0], 1) if channel else ()
        assert checkpoint.shape(f"{name}.weight_scale") == shape
        assert (f"{name}.input_scale" in checkpoint) == (not dynamic)
        decoded, wanted = checkpoint.decoded(name), source.tensor(f"{name}.weight")
        largest = wanted.float().abs().amax(1, keepdim=True)
        error = (decoded.float() - wanted.float()).abs()
        assert bool((error <= (largest if channel else largest.amax()) * 2.0**-4).all())
    if kv:
        assert load_decoder(checkpoint).kv_scales[1][0] == pytest.approx(0.02, rel=0.01)
    assert not [p for p in verify(directory).problems if p.severity == "error"]


@pytest.mark.parametrize(("channel", "dynamic"), [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("ignore", [("lm_head",), ()])
def test_logits_are_those_of_plain_arithmetic(
    channel: bool, dynamic: bool, ignore: tuple[str, ...], bf16: Path, tmp_path: Path
) -> None:
    """`--mode fp8_declared` of a CPU against float64 over the codes, token by token."""
    directory = tmp_path / "c"
    write_compressed(directory, bf16, channel=channel, dynamic=dynamic, kv=True, ignore=ignore)
    checkpoint = Checkpoint.open(directory)
    weights = load_cuda_weights(checkpoint, CPU, num_threads=2)
    assert {one.input_scale is None for one in layer_linears(weights.layers[0])} == {dynamic}
    assert weights.head.weight.format == ("bf16" if ignore else "fp8")
    text = checkpoint.config.text
    ids_T = torch.randint(0, text.vocab_size, (23,), generator=torch.Generator().manual_seed(1))
    decoder = load_decoder(checkpoint, mode="fp8_declared")
    attend = DenseAttend((0, len(ids_T)), decoder.kv_scales)
    found_TV = decoder(Step(ids_T, torch.arange(len(ids_T)), attend))
    wanted_TV = plain_logits(weights, RotaryTable(text, CPU).at, ids_T)
    # One e4m3 value in many falls to the other side of a tie: 6 % of it. Without a scale, or with
    # another token's, nothing is near.
    assert float((found_TV - wanted_TV).norm() / wanted_TV.norm()) < 0.12
    unrounded_TV = load_decoder(checkpoint)(Step(ids_T, torch.arange(len(ids_T)), attend))
    assert not torch.equal(unrounded_TV, found_TV)


def test_a_tower_that_is_ignored_stays_and_one_that_is_not_is_refused(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "bf16", config=tiny_config(vision=True, layers=1))
    kept = ("lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*")
    write_compressed(tmp_path / "kept", tmp_path / "bf16", ignore=kept)
    formats = Checkpoint.open(tmp_path / "kept").quantization.formats
    assert all(name.startswith("decoder.") for name in formats)
    write_compressed(tmp_path / "not", tmp_path / "bf16")
    with pytest.raises(CheckpointError, match=r"encoder\.0\.attention\.q and 16 more.*ignore"):
        Checkpoint.open(tmp_path / "not")


def test_linears_that_are_ignored_are_bf16(bf16: Path, tmp_path: Path) -> None:
    """Names, names with a pattern, and names of a group whose partners are quantized."""
    write_compressed(tmp_path / "c", bf16)
    raw = json.loads((tmp_path / "c/config.json").read_text())
    raw["quantization_config"]["ignore"] += ["model.layers.1.mlp.down_proj", "re:.*0.*o_proj"]
    (tmp_path / "c/config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"layers\.0.*o_proj"):
        Checkpoint.open(tmp_path / "c")  # its files are in FP8 still


def test_it_is_not_a_source_to_quantize(bf16: Path, tmp_path: Path) -> None:
    write_compressed(tmp_path / "c", bf16)
    with pytest.raises(UsageError, match="llm-compressor already"):
        refuse_export(tmp_path / "c", Checkpoint.open(tmp_path / "c").quantization)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_of_a_row_that_is_none_is_named(value: float, bf16: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    write_compressed(tmp_path / "c", bf16)
    file = tmp_path / "c/model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight_scale"
    tensors[name][5] = value
    save_file(tensors, file, {"format": "pt"})
    checkpoint = Checkpoint.open(tmp_path / "c")
    with pytest.raises(FormatError, match=name.replace(".", r"\.")):
        checkpoint.decoded("decoder.1.mlp.up")
    with pytest.raises(FormatError, match=name.replace(".", r"\.")):
        load_decoder(checkpoint)


def _set(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        *way, last = path.split("/")
        for step in way:
            config = config[step]
        config[last] = value

    return change


GROUP = "config_groups/group_0"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_set("format", "pack-quantized"), "format"),
        (_set(f"{GROUP}/weights/num_bits", 4), "num_bits"),
        (_set(f"{GROUP}/weights/type", "int"), "type"),
        (_set(f"{GROUP}/weights/strategy", "block"), "strategy"),
        (_set(f"{GROUP}/weights/group_size", 128), "group_size"),
        (_set(f"{GROUP}/weights/symmetric", False), "symmetric"),
        (_set(f"{GROUP}/weights/dynamic", True), "dynamic"),
        (_set(f"{GROUP}/input_activations", None), "input_activations"),
        (_set(f"{GROUP}/input_activations/strategy", "tensor"), "tensor with dynamic true"),
        (_set(f"{GROUP}/input_activations/dynamic", False), "token with dynamic false"),
        (_set(f"{GROUP}/input_activations/dynamic", "local"), "dynamic"),
        (_set(f"{GROUP}/output_activations", {}), "output_activations"),
        (_set(f"{GROUP}/targets", "Linear"), "targets"),
        (_set(f"{GROUP}/new_field", 1), "new_field"),
        (_set("config_groups", {}), "config_groups"),
        (_set("ignore", "lm_head"), "ignore"),
        (_set("sparsity_config", {"format": "sparse-24-bitmask"}), "sparsity_config"),
        (_set("kv_cache_scheme", {"num_bits": 4}), "kv_cache_scheme"),
        (_set("new_field", 1), "new_field"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(
    change: Callable[[dict[str, Any]], None], said: str
) -> None:
    config = compressed_config()
    compressed_facts(config)
    change(config)
    with pytest.raises(CheckpointError, match=said):
        compressed_facts(config)


def test_groups_of_unlike_scales_are_refused() -> None:
    config = compressed_config()
    config["config_groups"]["group_1"] = compressed_config(channel=False)["config_groups"][
        "group_0"
    ]
    with pytest.raises(CheckpointError, match="2 groups of unlike scales"):
        compressed_facts(config)


@given(
    layer=st.integers(0, 99),
    short=st.sampled_from(["self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj"]),
    prefix=st.sampled_from(["model.layers", "model.language_model.layers"]),
)
def test_names_and_patterns_choose_linears(layer: int, short: str, prefix: str) -> None:
    name = f"{prefix}.{layer}.{short}"
    other = f"{prefix}.{layer}.{short}x"
    for ignore, covers in (
        ([], True),
        ([name], False),
        ([other], True),
        (["Linear"], False),
        ([f"re:.*{short}"], False),
        ([f"re:{short}"], True),  # from the name's beginning
        ([r"re:.*\.lm_head$"], True),
    ):
        assert compressed_facts(compressed_config(ignore=ignore)).covers([name]) == covers
    config = compressed_config()
    config["config_groups"]["group_0"]["targets"] = [f"re:.*{short}$"]
    assert compressed_facts(config).covers([name])
    assert not compressed_facts(config).covers([other])
    config["ignore"] = ["re:("]
    with pytest.raises(CheckpointError, match="no pattern"):
        compressed_facts(config).covers([name])
