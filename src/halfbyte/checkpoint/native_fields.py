"""Fields of Mistral's own params.json, read into the architecture."""

from halfbyte.checkpoint.fields import (
    MAX_NORM_EPS,
    MIN_NORM_EPS,
    VISION_NORM_EPS,
    check_betas,
    check_text,
    check_window,
    is_tied,
    rope_theta,
)
from halfbyte.checkpoint.strict_fields import (
    FieldReader,
    Fields,
)
from halfbyte.config import ModelConfig, RopeConfig, TextConfig, VisionConfig
from halfbyte.errors import CheckpointError

IGNORED_PARAMS = {
    "max_batch_size": "a limit of another server",
    "max_seq_len": "a limit of another server",
    "model_parallel": "how the files were written",
    "ragged_attention": "how another library batches",
    "use_cache": "a default of another library",
    "model_type": "always transformer",
    "quantization": "read by metadata",
    "causal_vision": "checked with the encoder",
}


def native_config(raw: Fields, *, has_head: bool | None) -> ModelConfig:
    """Read the architecture that a native `params.json` describes.

    `has_head` as in `model_config`. Names: docs/reference/formats.md#names-and-layouts.
    """
    fields = FieldReader(raw, "params.json")
    window = fields.optional("sliding_window")
    for name in ("use_biases", "q_lora_rank", "moe"):
        fields.must_be(name, None, False)
    fields.must_be("causal", True, default=True)
    fields.must_be("activation", "silu", default="silu")
    vision = fields.optional("vision_encoder")
    norm_eps = fields.within("norm_eps", MIN_NORM_EPS, MAX_NORM_EPS)
    text = TextConfig(
        num_layers=fields.positive("n_layers"),
        width=fields.positive("dim"),
        num_heads=(num_heads := fields.positive("n_heads")),
        num_kv_heads=fields.positive("n_kv_heads", num_heads),
        head_dim=fields.positive("head_dim"),
        mlp_width=fields.positive("hidden_dim"),
        vocab_size=fields.positive("vocab_size"),
        norm_eps=norm_eps,
        max_positions=fields.positive("max_position_embeddings", 131072),
        tied_head=is_tied({"params.json": fields.optional("tied_embeddings")}, False, has_head),
        rope=_native_rope(fields),
        # Fixed ids of every Mistral tokenizer; params.json does not repeat them.
        bos_token_id=1,
        eos_token_ids=(2,),
        pad_token_id=11,
    )
    fields.finish(IGNORED_PARAMS)
    check_text(text, "params.json")
    check_window(window, text.max_positions, "params.json.sliding_window")
    return ModelConfig(text, None if vision is None else _native_vision(vision))


def _native_rope(fields: FieldReader) -> RopeConfig:
    theta = rope_theta(fields)
    yarn, llama_4 = fields.optional("yarn"), fields.optional("llama_4_scaling")
    beta, original = 0.0, 0
    if llama_4 is not None:
        scaling = FieldReader(llama_4, "params.json.llama_4_scaling")
        beta = scaling.within("beta", 0, default=0.0)
        original = scaling.integer("original_max_position_embeddings", 0)
        scaling.finish({})
    if yarn is None:
        return RopeConfig(theta, original_max_positions=original, llama_4_scaling_beta=beta)
    knobs = FieldReader(yarn, "params.json.yarn")
    applies = knobs.must_be("apply_scale", True, False, default=False)
    rope = RopeConfig(
        theta,
        kind="yarn",
        factor=knobs.within("factor", 1),
        original_max_positions=knobs.positive("original_max_position_embeddings"),
        beta_fast=knobs.number("beta", 32.0),
        beta_slow=knobs.number("alpha", 1.0),
        mscale=1.0,
        mscale_all_dim=0.0 if applies else 1.0,
        llama_4_scaling_beta=beta,
    )
    knobs.finish({})
    check_betas(rope, "params.json.yarn")
    if beta and original not in (0, rope.original_max_positions):
        raise CheckpointError(
            f"params.json: llama_4_scaling counts from {original} positions, yarn from "
            f"{rope.original_max_positions}; only one number is implemented"
        )
    return rope


# What params.json says about tokens and limits of images concerns the tokenizer, not the tower.
_IGNORED_NATIVE_VISION = {
    "image_break_token_id": "the tokenizer's",
    "image_end_token_id": "the tokenizer's",
    "max_image_size": "the tokenizer's limit; image_size fixes the position table",
    "mm_projector_id": "checked by the tensors that are there",
}


def _native_vision(raw: object) -> VisionConfig:
    fields = FieldReader(raw, "params.json.vision_encoder")
    merger = fields.must_be("mm_projector_id", "", "patch_merge", default="")
    has_norm = fields.must_be("add_pre_mm_projector_layer_norm", True, False, default=False)
    merge_size = fields.positive("spatial_merge_size", 1)
    # Files in use have norm and merger, or neither (Pixtral 12B, Pixtral Large).
    has_merger = bool(has_norm)
    if (merger == "patch_merge" or merge_size > 1) and not has_norm:
        raise CheckpointError(
            "params.json.vision_encoder merges patches without a norm before the projector "
            "(add_pre_mm_projector_layer_norm), which is not implemented"
        )
    width, num_heads = fields.positive("hidden_size"), fields.positive("num_attention_heads")
    config = VisionConfig(
        num_layers=fields.positive("num_hidden_layers"),
        width=width,
        num_heads=num_heads,
        head_dim=fields.positive("head_dim", width // num_heads),
        mlp_width=fields.positive("intermediate_size"),
        patch_size=fields.positive("patch_size"),
        image_size=fields.positive("image_size"),
        num_channels=fields.positive("num_channels", 3),
        rope_theta=rope_theta(fields, 10000.0),
        norm_eps=VISION_NORM_EPS,
        # The native tower gates with SiLU, its adapter uses GELU; neither is stated.
        activation="silu",
        spatial_merge_size=merge_size,
        projector_activation="gelu",
        projector_bias=bool(fields.must_be("adapter_bias", True, False, default=False)),
        image_token_id=fields.integer("image_token_id", 10),
        feature_layer=-1,
        has_merger=has_merger,
    )
    fields.finish(_IGNORED_NATIVE_VISION)
    return config
