"""Sources and readers of others: Mistral's own layout in, transformers on the other side."""

import dataclasses
import importlib
import importlib.util
import json
import math
import re
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor

from halfbyte.chat.images import ImageLayout, to_pixels
from halfbyte.chat.processor import processor_layout
from halfbyte.chat.tokens import load_chat
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.checkpoint.verify import verify
from halfbyte.errors import CheckpointError
from halfbyte.model.tiny import tiny_config, write_tiny_checkpoint
from halfbyte.modules import decoder_linears
from halfbyte.pictures import normalized
from halfbyte.quantize import export
from halfbyte.quantize.export import _with_sampling, export_files
from halfbyte.quantize.job import QuantizeConfig
from halfbyte.quantize.pipeline import quantize
from halfbyte.recipe.plan import make_plan
from halfbyte.recipe.schema import load_recipe

DATA = Path(__file__).parent.parent / "data"
RECIPE = load_recipe("medium-3.5")
LAYERS = 6
CONFIG = tiny_config(layers=LAYERS, vision=True)

# A second spelling of the names, as docs/reference/formats.md lists them, so that a slip in the
# package's own shows: hub name -> native name.
_NATIVE = (
    (r"lm_head\.", "output."),
    (r"model\.language_model\.embed_tokens\.", "tok_embeddings."),
    (r"model\.language_model\.norm\.", "norm."),
    (r"model\.language_model\.layers\.", "layers."),
    (r"model\.vision_tower\.transformer\.", "vision_encoder.transformer."),
    (r"model\.vision_tower\.", "vision_encoder."),
    (r"model\.multi_modal_projector\.patch_merger\.", "patch_merger."),
    (r"model\.multi_modal_projector\.norm\.", "pre_mm_projector_norm."),
    (r"model\.multi_modal_projector\.linear_1\.", "vision_language_adapter.w_in."),
    (r"model\.multi_modal_projector\.linear_2\.", "vision_language_adapter.w_out."),
    (r"(self_attn|attention)\.([qkvo])_proj\.", r"attention.w\2."),
    (r"(mlp|feed_forward)\.gate_proj\.", "feed_forward.w1."),
    (r"(mlp|feed_forward)\.up_proj\.", "feed_forward.w3."),
    (r"(mlp|feed_forward)\.down_proj\.", "feed_forward.w2."),
    (r"\.input_layernorm\.", ".attention_norm."),
    (r"\.post_attention_layernorm\.", ".ffn_norm."),
    (r"\.weight_scale_inv$", ".qscale_weight"),
    (r"\.activation_scale$", ".qscale_act"),
)


def native_name(name: str) -> str:
    for pattern, native in _NATIVE:
        name = re.sub(pattern, native, name)
    return name


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of rotary halves as rows of pairs (docs/reference/formats.md#names-and-layouts)."""
    rows, columns = weight.shape
    halves = weight.view(torch.uint8).view(heads, 2, rows // heads // 2, -1)
    return halves.transpose(1, 2).reshape(rows, -1).view(weight.dtype).view(rows, columns)


def write_native(hub: Path, directory: Path) -> None:
    """The same model in Mistral's own layout: consolidated file and params.json."""
    text, vision = CONFIG.text, CONFIG.vision
    assert vision is not None
    stored = {}
    for name, tensor in load_file(hub / "model.safetensors").items():
        short = re.search(r"\.([qk])_proj\.weight$", name)
        if short is not None:
            heads = text.num_heads if short[1] == "q" else text.num_kv_heads
            tensor = interleaved(tensor, vision.num_heads if "vision_tower" in name else heads)
        stored[native_name(name)] = tensor
    # What its own training tools leave behind, and every converter drops.
    stored["layers.0.attention.k_fake_quantizer.qscale_act"] = torch.tensor(1.0)
    directory.mkdir()
    save_file(stored, directory / "consolidated.safetensors")
    rope = text.rope
    params = {
        "dim": text.width, "n_layers": text.num_layers, "head_dim": text.head_dim,
        "hidden_dim": text.mlp_width, "n_heads": text.num_heads, "n_kv_heads": text.num_kv_heads,
        "rope_theta": rope.theta, "norm_eps": text.norm_eps, "vocab_size": text.vocab_size,
        "tied_embeddings": False, "max_position_embeddings": text.max_positions,
        "yarn": {
            "original_max_position_embeddings": rope.original_max_positions,
            "factor": rope.factor, "apply_scale": rope.mscale_all_dim == 0.0,
            "beta": rope.beta_fast, "alpha": rope.beta_slow,
        },
        "llama_4_scaling": {
            "original_max_position_embeddings": rope.original_max_positions,
            "beta": rope.llama_4_scaling_beta,
        },
        "quantization": {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"},
        "vision_encoder": {
            "image_token_id": vision.image_token_id, "image_break_token_id": 12,
            "image_end_token_id": 13, "intermediate_size": vision.mlp_width,
            "num_hidden_layers": vision.num_layers, "num_attention_heads": vision.num_heads,
            "mm_projector_id": "patch_merge", "spatial_merge_size": vision.spatial_merge_size,
            "hidden_size": vision.width, "num_channels": vision.num_channels,
            "image_size": vision.image_size, "max_image_size": vision.image_size,
            "patch_size": vision.patch_size, "rope_theta": vision.rope_theta,
            "add_pre_mm_projector_layer_norm": True, "adapter_bias": vision.projector_bias,
        },
    }  # fmt: skip
    (directory / "params.json").write_text(json.dumps(params))
    (directory / "tekken.json").write_text("{}")


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`hub` and `native`, one model in two layouts, and the exports of both: `hub-out`, ..."""
    root = tmp_path_factory.mktemp("interop")
    write_tiny_checkpoint(root / "hub", config=CONFIG, dialect="mistral-fp8")
    write_native(root / "hub", root / "native")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, CONFIG.text.vocab_size, (3, 90), generator=generator)
    save_file({"batch0.input_ids": ids}, root / "tokens.safetensors")
    for name in ("hub", "native"):
        config = QuantizeConfig(
            root / name,
            root / f"{name}-out",
            RECIPE,
            calibration_tokens=root / "tokens.safetensors",
            with_errors=False,
        )
        quantize(config)
    return root


def test_a_native_source_becomes_the_export_of_its_hub_twin(exports: Path) -> None:
    """Names, row order of q and k in text and vision, scales, YaRN: any slip changes bytes."""
    ours, theirs = (load_file(exports / f"{x}-out/model.safetensors") for x in ("hub", "native"))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (
            tensor.reshape(-1).view(torch.uint8).equal(theirs[name].reshape(-1).view(torch.uint8))
        ), name
    hub, native = (Checkpoint.open(exports / f"{x}-out") for x in ("hub", "native"))
    assert hub.layout == native.layout == "hf"
    assert hub.quantization == native.quantization
    assert native.config.text == hub.config.text


def test_an_export_of_a_native_source_has_what_a_server_needs(exports: Path) -> None:
    output = exports / "native-out"
    report = verify(output, exports / "native")
    assert report.is_sound, report.problems
    names = {path.name for path in output.iterdir()}
    assert names >= {"config.json", "hf_quant_config.json", "tekken.json", "generation_config.json"}
    # Beside consolidated files engines would read these; without them some still look.
    assert "params.json" not in names and not any(n.startswith("consolidated") for n in names)
    generation = json.loads((output / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 2 and generation["bos_token_id"] == 1
    vision = json.loads((output / "preprocessor_config.json").read_text())
    assert vision["patch_size"] == {"height": 14, "width": 14}
    assert vision["size"] == {"longest_edge": 280}


@pytest.mark.parametrize("name", ["native-out", "hub-out"])
@pytest.mark.parametrize("width, height", [(28, 28), (27, 29), (100, 61), (641, 479), (900, 40)])
def test_transformers_makes_the_pixels_that_we_make_from_the_exported_settings(
    exports: Path, name: str, width: int, height: int
) -> None:
    """Its image processor on Pillow, loaded from the export, which needs no torchvision."""
    transformers = pytest.importorskip("transformers")
    processor = transformers.AutoImageProcessor.from_pretrained(exports / name, backend="pil")
    assert type(processor).__name__ == "PixtralImageProcessorPil"
    assert CONFIG.vision is not None
    patch = CONFIG.vision.patch_size * CONFIG.vision.spatial_merge_size
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    picture = Image.fromarray(values)
    # PixtralProcessor hands the side of a merged patch on.
    (expected,) = processor(picture, return_tensors="np", patch_size=patch)["pixel_values"]
    layout = ImageLayout(patch, CONFIG.vision.image_size, 10, 12, 13, whole_side=math.floor)
    columns, rows = layout.grid(width, height)
    ours = normalized(to_pixels(picture, (columns * patch, rows * patch)))
    assert np.array_equal(ours, expected)


def test_the_exported_processor_merges_patches_as_the_model_does(exports: Path) -> None:
    """What `PixtralProcessor` reads; without it patches have 16 pixels and none are merged."""
    assert CONFIG.vision is not None
    ids = {"[IMG]": CONFIG.vision.image_token_id, "[IMG_BREAK]": 12, "[IMG_END]": 13}
    layout = processor_layout(exports / "native-out", ids)
    assert layout is not None
    assert layout.patch_pixels == 2 * 14 and layout.max_side_pixels == 280


@pytest.fixture
def read_processor(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Any]:
    """`PixtralProcessor` of a folder, with its Pillow pixels.

    Its file imports torchvision for the other pixels, which are not asked for here; an empty module
    stands in where torchvision is not installed.
    """
    transformers = pytest.importorskip("transformers")
    if importlib.util.find_spec("torchvision") is None:
        for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.v2"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        functional = types.ModuleType("torchvision.transforms.v2.functional")
        monkeypatch.setattr(
            sys.modules["torchvision.transforms.v2"], "functional", functional, raising=False
        )
    module = importlib.import_module("transformers.models.pixtral.processing_pixtral")

    def read(folder: Path) -> Any:
        settings = json.loads((folder / "processor_config.json").read_text())
        assert settings.pop("processor_class") == "PixtralProcessor"
        return module.PixtralProcessor(
            image_processor=transformers.AutoImageProcessor.from_pretrained(folder, backend="pil"),
            # Where it sees a tekken.json a newer release takes mistral-common unless told not to.
            tokenizer=transformers.AutoTokenizer.from_pretrained(folder, mistral_format=False),
            **settings,
        )

    return read


@pytest.mark.parametrize("width, height", [(27, 29), (100, 61), (641, 479)])
def test_transformers_makes_the_image_tokens_that_we_make(
    exports: Path,
    tmp_path: Path,
    read_processor: Callable[[Path], Any],
    width: int,
    height: int,
) -> None:
    names = ["<unk>", "<s>", "</s>", "[IMG]", "[IMG_BREAK]", "[IMG_END]", "see"]
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens(names[:6])
    shutil.copytree(exports / "native-out", tmp_path / "out")
    tokenizer.save(str(tmp_path / "out/tokenizer.json"))
    (tmp_path / "out/tekken.json").unlink()
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    (tmp_path / "out/tokenizer_config.json").write_text(json.dumps(settings))
    processor = read_processor(tmp_path / "out")
    picture = Image.new("RGB", (width, height), "red")
    made = processor(text="see [IMG]", images=[picture])
    layout = processor_layout(tmp_path / "out", vocabulary)
    assert layout is not None
    columns, rows = layout.grid(width, height)
    ids = torch.as_tensor(made["input_ids"]).flatten().tolist()
    assert ids == [6, *layout.tokens(columns, rows)]
    assert tuple(made["pixel_values"].shape[-2:]) == (rows * 28, columns * 28)


def made_files(directory: Path) -> dict[str, bytes]:
    checkpoint = Checkpoint.open(directory)
    return export_files(checkpoint, make_plan(RECIPE, checkpoint.config))


def with_tekken(directory: Path, *, vision: bool = True) -> Path:
    config = tiny_config(layers=LAYERS, vision=vision)
    text = dataclasses.replace(config.text, vocab_size=800)
    write_tiny_checkpoint(
        directory, config=dataclasses.replace(config, text=text), dialect="mistral-fp8"
    )
    shutil.copy(DATA / "chat/tekken/tekken.json", directory)
    return directory


@pytest.mark.parametrize("has_settings", [False, True])
def test_transformers_places_pictures_by_the_files_made_of_a_tekken_json(
    tmp_path: Path, read_processor: Callable[[Path], Any], has_settings: bool
) -> None:
    """What vLLM does at its start: the text of an image token, and a picture, to the processor."""
    source = with_tekken(tmp_path / "source")
    plain = made_files(with_tekken(tmp_path / "text", vision=False))
    if has_settings:
        (source / "tokenizer_config.json").write_text('{"eos_token": "</s>", "kept": 1}')
    for name, content in made_files(source).items():
        (tmp_path / name).write_bytes(content)
    if has_settings:
        assert json.loads((tmp_path / "tokenizer_config.json").read_text())["kept"] == 1
    processor = read_processor(tmp_path)
    chat = load_chat(tmp_path)
    assert chat.image_layout is not None
    layout = processor_layout(tmp_path, chat.vocabulary.control)
    assert layout is not None
    made = processor(text="é[IMG]x", images=[Image.new("RGB", (100, 61), "red")])
    ids = torch.as_tensor(made["input_ids"]).flatten().tolist()
    columns, rows = layout.grid(100, 61)
    encode = chat.vocabulary.encode_text
    assert ids == [*encode("é"), *layout.tokens(columns, rows), *encode("x")]
    control = chat.vocabulary.control
    assert {control["[IMG]"], control["[IMG_BREAK]"], control["[IMG_END]"]} <= set(ids)
    # A model without a tower, and one that has a tokenizer.json, get none of this.
    assert not {"tokenizer.json", "chat_template.jinja", "processor_config.json"} & set(plain)
    (source / "tokenizer.json").write_text("{}")
    files = made_files(source)
    assert files["tokenizer.json"] == b"{}" and "chat_template.jinja" not in files
    assert "processor_config.json" not in files


def test_transformers_loads_what_was_passed_through(exports: Path) -> None:
    """Its own class, filled from the export, and its vision tower gives the source's features."""
    transformers = pytest.importorskip("transformers")
    raw = json.loads((exports / "hub-out/config.json").read_text())
    raw.pop("quantization_config")
    raw.pop("architectures", None)
    config = transformers.Mistral3Config.from_dict(raw)
    assert config.text_config.num_hidden_layers == LAYERS

    def tower(directory: str) -> tuple[Any, Any]:
        torch.manual_seed(0)
        model = transformers.Mistral3ForConditionalGeneration._from_config(
            config, dtype=torch.bfloat16
        )
        loaded = load_file(exports / directory / "model.safetensors")
        plain = {k: v for k, v in loaded.items() if v.dtype == torch.bfloat16 and v.dim() > 0}
        return model.eval(), model.load_state_dict(plain, strict=False)

    model, result = tower("hub-out")
    assert result.unexpected_keys == []
    linears = {
        f"{Checkpoint.open(exports / 'hub-out').foreign(f'{x.name}.weight')}"
        for x in decoder_linears(CONFIG)
    }
    assert set(result.missing_keys) == linears
    twin, _ = tower("hub")
    pixels = torch.randn(1, 3, 56, 84, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = (
            x.model.vision_tower(pixels.bfloat16(), image_sizes=torch.tensor([[56, 84]]))
            for x in (model, twin)
        )
    assert ours.last_hidden_state.equal(theirs.last_hidden_state)
    assert float(ours.last_hidden_state.float().std()) > 0
    for name in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
        assert model.state_dict()[name].equal(load_file(exports / "hub/model.safetensors")[name])


@pytest.mark.parametrize(
    "told, wanted",
    [
        (None, {"temperature": 0.7, "top_p": 0.95, "eos_token_id": 2, "bos_token_id": 1}),
        ({"eos_token_id": 5}, {"temperature": 0.7, "top_p": 0.95, "eos_token_id": 5}),
        ({"top_p": 0.5}, {"top_p": 0.5}),
    ],
)
def test_an_export_carries_the_sampling_that_the_models_makers_recommend(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    told: dict[str, Any] | None,
    wanted: dict[str, Any],
) -> None:
    """Clients that say nothing get what the model was made for; a source's own word stands."""
    write_tiny_checkpoint(tmp_path, config=CONFIG, dialect="mistral-fp8")
    file = tmp_path / "generation_config.json"
    file.unlink()
    if told is not None:
        file.write_text(json.dumps(told))
    before = made_files(tmp_path)
    assert "temperature" not in json.loads(before["generation_config.json"])
    sizes = {(CONFIG.text.num_layers, CONFIG.text.width): {"temperature": 0.7, "top_p": 0.95}}
    assert export._RECOMMENDED.keys() == {(88, 12288)}
    monkeypatch.setattr(export, "_RECOMMENDED", sizes)
    made = json.loads(made_files(tmp_path)["generation_config.json"])
    assert made.pop("pad_token_id", 11) == 11 and made == wanted


@pytest.mark.parametrize(
    "there, expected",
    [
        (b'{"max_length": 9}', {"max_length": 9, "temperature": 0.7, "top_p": 0.95}),
        (b'\xef\xbb\xbf{"do_sample": true}',
         {"do_sample": True, "temperature": 0.7, "top_p": 0.95}),
        (b'{"temperature": 0.1}', None),
        (b'{"top_k": 5}', None),
        (b'{"top_k": null}', {"top_k": None, "temperature": 0.7, "top_p": 0.95}),
        (b"[1]", "must hold a JSON object"),
        (b"{", "is not JSON"),
        (b"\xff", "is not JSON"),
    ],
)  # fmt: skip
def test_recommended_sampling_is_added_where_there_is_none(there: bytes, expected: object) -> None:
    text = types.SimpleNamespace(
        num_layers=88, width=12288, bos_token_id=1, eos_token_ids=(2,), pad_token_id=11
    )
    made_for = cast("Checkpoint", types.SimpleNamespace(config=types.SimpleNamespace(text=text)))
    if isinstance(expected, str):
        with pytest.raises(CheckpointError, match=f"generation_config.json {expected}"):
            _with_sampling(made_for, there)
        return
    made = _with_sampling(made_for, there)
    assert (None if made is None else json.loads(made)) == expected
    text.width = 64
    assert _with_sampling(made_for, there) is None
