"""Foreign config.json and params.json fields -> our frozen configs, strictly.

A field that is neither used, nor checked, nor listed as ignored with a reason is refused by name:
it might change numerics. `metadata` calls this for the architecture; what concerns quantization is
there.

Rules: docs/reference/formats.md, #names-and-layouts and #what-serving-engines-expect.
Sources: `transformers` configuration classes of Mistral3, Ministral3 and Pixtral (defaults), its
YaRN parameters (what absence means).
"""

import math
from typing import Any, Literal

from halfbyte.checkpoint.strict_fields import (
    IGNORED_ANYWHERE,
    MAX_INTEGER,
    MAX_LAYERS,
    FieldReader,
    Fields,
)
from halfbyte.config import ModelConfig, RopeConfig, TextConfig, VisionConfig
from halfbyte.errors import CheckpointError, shown

IGNORED_TEXT = {
    **IGNORED_ANYWHERE,
    "pretraining_tp": "how training was split",
    "is_llama_config": "mark of a conversion tool",
    "rope_interleaved": "mark of a conversion tool; hub files hold halves",
}
IGNORED_VISION = {
    **IGNORED_ANYWHERE,
    "vocab_size": "a left-over of the library's default; the tower has no vocabulary",
    "layer_norm_eps": "a left-over; the tower's norms use 1e-5 whatever it says",
}
IGNORED_MODEL = {
    **IGNORED_ANYWHERE,
    "vision_feature_select_strategy": "Pixtral has no class token to select; llava is checked",
    "image_seq_length": "a hint about lengths for another library's processor",
    "quantization_config": "read by metadata",
    "compression_config": "read by metadata",
}
IGNORED_ROPE = {
    "max_position_embeddings": "the extended length; positions are not clipped",
    "original_max_position_embeddings": "means something for yarn and the query scale only",
    "finetuned": "mark of training",
}

# Norms of the tower are built with this constant, whatever the config says.
VISION_NORM_EPS = 1e-5
_TEXT_TYPES = ("ministral3", "mistral")
# A text model under `text_config` with a Pixtral tower beside it. `llava` is what others made of
# Pixtral 12B and Pixtral Large, which have no merger before their projector.
MULTIMODAL_TYPES = ("mistral3", "llava")

# Added to a mean square before its root is taken: 1e-5 or 1e-6 in every model. Nothing below keeps
# a zero vector from becoming NaN; with more than 1 it would no longer be a norm.
MIN_NORM_EPS, MAX_NORM_EPS = 1e-30, 1.0


def model_config(raw: Fields, *, has_head: bool | None) -> ModelConfig:
    """Read the architecture that a hub `config.json` describes.

    raw        the parsed file; not modified
    has_head   whether the files store a head of their own. Decides what `tie_word_embeddings`
               leaves open: newer library classes default to true for the multimodal class and to
               false for the text class, and many published files say nothing. None means unknown.

    Raises CheckpointError for a missing field, an unknown one, or a value we do not implement.
    """
    kind = raw.get("model_type")
    if kind in _TEXT_TYPES:
        tied = is_tied({"config.json": raw.get("tie_word_embeddings")}, False, has_head)
        return ModelConfig(_text(raw, "config.json", IGNORED_MODEL | IGNORED_TEXT, tied), None)
    if kind not in MULTIMODAL_TYPES:
        known = ", ".join((*MULTIMODAL_TYPES, *_TEXT_TYPES))
        raise CheckpointError(f"config.json: model_type {shown(kind)} is not one of {known}")
    fields = FieldReader(raw, "config.json")
    fields.optional("model_type")
    text, vision = fields.optional("text_config"), fields.optional("vision_config")
    if not isinstance(text, dict):
        raise CheckpointError("config.json lacks text_config")
    if kind == "llava":
        # The other value drops the first patch, which is a class token in other towers.
        fields.must_be("vision_feature_select_strategy", "full", default="default")
    said = {
        "config.json": fields.optional("tie_word_embeddings"),
        "text_config": text.get("tie_word_embeddings"),
    }
    config = ModelConfig(
        _text(text, "text_config", IGNORED_TEXT, is_tied(said, True, has_head)),
        None if vision is None else _vision(vision, fields, is_llava=kind == "llava"),
    )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        fields.optional(name)  # a copy of the text part's
    fields.finish(IGNORED_MODEL)
    return config


def is_tied(said: dict[str, Any], default: bool, has_head: bool | None) -> bool:
    """Whether the head is the embedding, from what the files say and what they store."""
    stated = [value for value in said.values() if value is not None]
    values = {value for value in stated if isinstance(value, bool)}
    if not all(isinstance(value, bool) for value in stated):
        raise CheckpointError(f"tie_word_embeddings must be true or false: {shown(said)}")
    if has_head is not None and values != {not has_head}:
        if values == {True}:
            raise CheckpointError(
                "tie_word_embeddings is true, but the files store a head of their own; "
                "say false, or remove it"
            )
        if values != {False}:
            return not has_head
    return values.pop() if len(values) == 1 else default


def _token_ids(value: Any, where: str) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(item) is int and 0 <= item <= MAX_INTEGER for item in ids):
        raise CheckpointError(f"{where}: token ids were expected: {shown(value)}")
    return tuple(ids)


def _text(raw: Fields, where: str, ignored: dict[str, str], tied: bool) -> TextConfig:
    fields = FieldReader(raw, where)
    kind = fields.must_be("model_type", *_TEXT_TYPES)
    fields.must_be("hidden_act", "silu", default="silu")
    fields.must_be("attention_bias", False, default=False)
    fields.must_be("mlp_bias", False, default=False)
    fields.must_be("is_decoder", True, False, default=True)
    fields.must_be("partial_rotary_factor", 1.0, default=1.0)
    fields.optional("tie_word_embeddings")
    layer_types = fields.optional("layer_types")
    if layer_types is not None and not _all_full(layer_types):
        other = (
            next((x for x in layer_types if x != "full_attention"), "")
            if isinstance(layer_types, list)
            else layer_types
        )
        raise CheckpointError(
            f"{where}.layer_types has {shown(other)}: only full_attention, by which a token "
            "attends to all before it, is implemented"
        )
    window = fields.optional("sliding_window")
    width, num_heads = fields.positive("hidden_size"), fields.positive("num_attention_heads")
    # Absence means width / heads in older files of the library; the big model states 128.
    head_dim = fields.optional("head_dim")
    config = TextConfig(
        num_layers=fields.positive("num_hidden_layers"),
        width=width,
        num_heads=num_heads,
        num_kv_heads=fields.positive("num_key_value_heads", num_heads),
        head_dim=width // num_heads if head_dim is None else head_dim,
        mlp_width=fields.positive("intermediate_size"),
        vocab_size=fields.positive("vocab_size"),
        norm_eps=fields.within("rms_norm_eps", MIN_NORM_EPS, MAX_NORM_EPS),
        max_positions=fields.positive("max_position_embeddings"),
        rope=_rope(fields, where),
        tied_head=tied,
        bos_token_id=_first(_token_ids(fields.optional("bos_token_id"), where)),
        eos_token_ids=_token_ids(fields.optional("eos_token_id"), where),
        pad_token_id=_first(_token_ids(fields.optional("pad_token_id"), where)),
    )
    fields.finish(ignored)
    check_text(config, where)
    check_window(window, config.max_positions, f"{where}.sliding_window")
    if kind == "mistral" and "sliding_window" not in raw and config.max_positions > _DEFAULT_WINDOW:
        raise CheckpointError(
            f"{where} says nothing of sliding_window, which means {_DEFAULT_WINDOW} for "
            f"model_type mistral and is not implemented for {config.max_positions} positions. If "
            'the model was trained to attend to all of them, say "sliding_window": null'
        )
    return config


# What MistralConfig of the library means by saying nothing; Ministral3Config means none.
_DEFAULT_WINDOW = 4096


def check_window(window: Any, max_positions: int, where: str) -> None:
    """Refuse a sliding window, unless it is as long as the model's context and so hides nothing."""
    if window is None or (type(window) is int and window >= max_positions):
        return
    raise CheckpointError(
        f"{where} = {shown(window)}: in this model a token attends to the last {shown(window)} "
        f"positions of {max_positions} only, which is not implemented; models that attend to all "
        "of them have null here"
    )


def _all_full(layer_types: Any) -> bool:
    return isinstance(layer_types, list) and all(kind == "full_attention" for kind in layer_types)


def _first(ids: tuple[int, ...]) -> int | None:
    return ids[0] if ids else None


def check_text(text: TextConfig, where: str) -> None:
    """Raise CheckpointError for sizes that no model has, or that do not fit each other."""
    if text.num_layers > MAX_LAYERS:
        raise CheckpointError(f"{where}: {text.num_layers} layers")
    head_dim = text.head_dim
    if type(head_dim) is not int or not 2 <= head_dim <= MAX_INTEGER or head_dim % 2:
        raise CheckpointError(f"{where}.head_dim = {shown(head_dim)}: must be even")
    if text.num_heads % text.num_kv_heads:
        raise CheckpointError(
            f"{where}: {text.num_heads} query heads do not share {text.num_kv_heads} KV heads"
        )


def _rope(fields: FieldReader, where: str) -> RopeConfig:
    """Rotary settings from `rope_parameters`, or from the older `rope_theta` + `rope_scaling`."""
    theta, scaling = fields.optional("rope_theta"), fields.optional("rope_scaling")
    parameters = fields.optional("rope_parameters")
    if parameters is None:
        if theta is None:
            raise CheckpointError(f"{where} lacks rope_parameters (or rope_theta)")
        if not isinstance(scaling, dict | None):
            raise CheckpointError(f"{where}.rope_scaling: an object was expected")
        parameters = {"rope_type": "default", **(scaling or {}), "rope_theta": theta}
    elif scaling not in (None, parameters):
        raise CheckpointError(f"{where}: rope_parameters and rope_scaling disagree")
    elif isinstance(parameters, dict) and theta not in (None, parameters.get("rope_theta", theta)):
        raise CheckpointError(f"{where}: rope_parameters.rope_theta and rope_theta disagree")
    elif isinstance(parameters, dict) and theta is not None:
        parameters = {**parameters, "rope_theta": theta}
    return rope_config(parameters, f"{where}.rope_parameters")


def rope_config(parameters: object, where: str) -> RopeConfig:
    """Read one object of `rope_parameters` into the rotary configuration of the decoder.

    A missing `llama_4_scaling_beta` means 0. For yarn, mscale and mscale_all_dim count only if
    both are non-zero (as in the library that published them); otherwise the attention factor is
    1 + 0.1 ln(factor), which is written here as mscale 1 over mscale_all_dim 0.
    """
    fields = FieldReader(parameters, where)
    kind, older = fields.optional("rope_type"), fields.optional("type")
    if kind is not None and older is not None and kind != older:
        raise CheckpointError(f"{where}: rope_type {shown(kind)} and type {shown(older)} disagree")
    kind = kind or older or "default"
    theta = rope_theta(fields)
    fields.must_be("partial_rotary_factor", 1.0, default=1.0)
    beta = fields.within("llama_4_scaling_beta", 0, default=0.0)
    if kind == "default":
        original = fields.integer("original_max_position_embeddings", 0)
        rope = RopeConfig(theta, original_max_positions=original, llama_4_scaling_beta=beta)
    elif kind == "yarn":
        rope = _yarn(fields, theta, beta, where)
    else:
        raise CheckpointError(f"{where}: rope_type {shown(kind)} is not one of default, yarn")
    fields.finish(IGNORED_ROPE)
    if rope.llama_4_scaling_beta and rope.original_max_positions == 0:
        raise CheckpointError(
            f"{where}: llama_4_scaling_beta needs original_max_position_embeddings"
        )
    return rope


def rope_theta(fields: FieldReader, default: float | None = None) -> float:
    """The base of the rotary frequencies: its powers with negative exponents must fall."""
    return fields.within("rope_theta", 1, default=default)


def check_betas(rope: RopeConfig, where: str) -> RopeConfig:
    """Return the settings, or raise CheckpointError if the slow beta is over the fast one."""
    if not 0 < rope.beta_slow <= rope.beta_fast:
        raise CheckpointError(
            f"{where}: beta_fast {rope.beta_fast:g} and beta_slow {rope.beta_slow:g} must be above "
            "0, and the slow one no larger"
        )
    return rope


def _yarn(fields: FieldReader, theta: float, beta: float, where: str) -> RopeConfig:
    fields.must_be("truncate", True, default=True)
    mscale = fields.within("mscale", 0, default=0.0)
    all_dim = fields.within("mscale_all_dim", 0, default=0.0)
    if not (mscale and all_dim):
        mscale, all_dim = 1.0, 0.0
    rope = RopeConfig(
        theta,
        kind="yarn",
        factor=fields.within("factor", 1),
        original_max_positions=fields.positive("original_max_position_embeddings"),
        beta_fast=fields.number("beta_fast", 32.0),
        beta_slow=fields.number("beta_slow", 1.0),
        mscale=mscale,
        mscale_all_dim=all_dim,
        llama_4_scaling_beta=beta,
    )
    expected = rope.attention_factor
    stated = fields.number("attention_factor", expected)
    if not math.isclose(stated, expected, rel_tol=1e-6):
        raise CheckpointError(
            f"{where}.attention_factor = {stated!r}, but factor, mscale and mscale_all_dim give "
            f"{expected:.6g}; only the latter is implemented"
        )
    return check_betas(rope, where)


def _vision(raw: object, model: FieldReader, *, is_llava: bool) -> VisionConfig:
    """The tower, and what the model says of its use; the two classes differ in what absence means.

    LLaVA's has a bias, marks pictures by id 32000, and merges no patches.
    """
    fields = FieldReader(raw, "vision_config")
    fields.must_be("model_type", "pixtral")
    width, num_heads = fields.positive("hidden_size"), fields.positive("num_attention_heads")
    head_dim = fields.positive("head_dim", width // num_heads)
    if head_dim * num_heads != width:
        raise CheckpointError(f"vision_config: {num_heads} heads of {head_dim} are not {width}")
    config = VisionConfig(
        num_layers=fields.positive("num_hidden_layers"),
        width=width,
        num_heads=num_heads,
        head_dim=head_dim,
        mlp_width=fields.positive("intermediate_size"),
        patch_size=fields.positive("patch_size", 16),
        image_size=fields.positive("image_size", 1024),
        num_channels=fields.positive("num_channels", 3),
        rope_theta=_vision_theta(fields),
        norm_eps=VISION_NORM_EPS,
        activation=_activation(fields, "hidden_act"),
        spatial_merge_size=1 if is_llava else model.positive("spatial_merge_size", 2),
        projector_activation=_activation(model, "projector_hidden_act"),
        projector_bias=bool(
            model.must_be("multimodal_projector_bias", True, False, default=is_llava)
        ),
        image_token_id=_image_token(model, 32000 if is_llava else 10),
        feature_layer=_feature_layer(model, -2 if is_llava else -1),
        has_merger=not is_llava,
    )
    fields.finish(IGNORED_VISION)
    return config


def _activation(fields: FieldReader, name: str) -> Literal["silu", "gelu"]:
    """An activation by name; absence means gelu, the default of both library classes."""
    value: Literal["silu", "gelu"] = fields.must_be(name, "silu", "gelu", default="gelu")
    return value


def _vision_theta(fields: FieldReader) -> float:
    """Theta of the 2-D rope: newer files nest it; the rope type is called default or axial."""
    theta, parameters = fields.optional("rope_theta"), fields.optional("rope_parameters")
    fields.must_be("rope_scaling", None)
    if parameters is None:
        parameters = {"rope_theta": 10000.0 if theta is None else theta}
    rope = FieldReader(parameters, "vision_config.rope_parameters")
    for name in ("rope_type", "type"):
        rope.must_be(name, "default", "axial", default="default")
    value = rope_theta(rope, theta)
    rope.finish({})
    return value


def _image_token(model: FieldReader, default: int) -> int:
    """The id that image patches replace; the field has two names."""
    alias = model.integer("image_token_id", default)
    return model.integer("image_token_index", alias)


def _feature_layer(model: FieldReader, default: int) -> int:
    value = model.optional("vision_feature_layer")
    if value is None:
        return default
    if type(value) is not int:
        raise CheckpointError(
            f"config.json.vision_feature_layer = {shown(value)} is not implemented, only one layer"
        )
    return value
