"""A checkpoint described for people: geometry, dialect, formats, sizes. Called by `inspect`."""

from collections import Counter

from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.config import RopeConfig, TextConfig, VisionConfig

_DIALECTS = {
    "none": "bf16, not quantized",
    "mistral-fp8": "Mistral FP8 (per-tensor static, weight_scale_inv)",
    "modelopt": "Model Optimizer export",
    "compressed": "compressed-tensors FP8 (llm-compressor)",
}


def overview(checkpoint: Checkpoint) -> str:
    """A dozen lines: what the directory holds and how many bytes each part takes."""
    config, quantization = checkpoint.config, checkpoint.quantization
    shards = {checkpoint.shard(name).name for name in checkpoint.names()}
    total = sum(map(checkpoint.num_bytes, checkpoint.names()))
    formats = Counter(quantization.formats.values())
    rows = [
        ("directory", str(checkpoint.directory)),
        ("dialect", f"{_DIALECTS[quantization.dialect]}; layout {checkpoint.layout}"),
        ("decoder", _decoder(config.text)),
        ("rope", _rope(config.text.rope, config.text.max_positions)),
        ("head", "tied to the embedding" if config.text.tied_head else "its own"),
        ("vision", "none" if config.vision is None else _vision(config.vision)),
        ("linears", ", ".join(f"{count} {kind}" for kind, count in sorted(formats.items()))),
        ("KV cache", quantization.kv_cache),
        ("tensors", f"{len(checkpoint.names()):,} in {len(shards)} file(s), {total:,} bytes"),
    ]
    rows += [(f"  {part}", f"{size:,} bytes") for part, size in _parts(checkpoint).items() if size]
    rows += [("ignored", f"{name}: {why}") for name, why in sorted(checkpoint.ignored.items())]
    return "\n".join(f"{name:<20}{value}" for name, value in rows)


def _decoder(text: TextConfig) -> str:
    return (
        f"{text.num_layers} layers, width {text.width}, {text.num_heads} query and "
        f"{text.num_kv_heads} KV heads of {text.head_dim}, MLP {text.mlp_width}, "
        f"vocabulary {text.vocab_size}"
    )


def _rope(rope: RopeConfig, max_positions: int) -> str:
    parts = [f"{rope.kind}, theta {rope.theta:g}, up to {max_positions} positions"]
    if rope.kind == "yarn":
        parts.append(
            f"factor {rope.factor:g} over {rope.original_max_positions}, beta {rope.beta_fast:g}/"
            f"{rope.beta_slow:g}, mscale {rope.mscale:g}/{rope.mscale_all_dim:g}"
        )
    if rope.llama_4_scaling_beta:
        parts.append(f"query scale beta {rope.llama_4_scaling_beta:g}")
    return "; ".join(parts)


def _vision(vision: VisionConfig) -> str:
    return (
        f"{vision.num_layers} layers, width {vision.width}, {vision.num_heads} heads, "
        f"patches of {vision.patch_size}, merged {vision.spatial_merge_size}x"
        f"{vision.spatial_merge_size}, images up to {vision.image_size}"
    )


def _parts(checkpoint: Checkpoint) -> dict[str, int]:
    """Bytes by part of the model, scales with their weights."""
    sizes: Counter[str] = Counter()
    for name in checkpoint.names():
        part, _, rest = name.partition(".")
        group = rest.split(".")[1] if part == "decoder" and rest.count(".") > 1 else ""
        is_group = group in ("attention", "mlp")
        sizes[f"decoder {group if is_group else 'norms'}" if part == "decoder" else part] += (
            checkpoint.num_bytes(name)
        )
    return dict(sizes)
