"""Fields of a JSON object read strictly: each is used, or ignored by name and for a reason."""

import math
from typing import Any

from halfbyte.errors import CheckpointError, shown

Fields = dict[str, Any]


# Fields that no forward pass of ours depends on, and why.
IGNORED_ANYWHERE = {
    "_name_or_path": "where somebody loaded it from",
    "architectures": "class names of another library; model_type decides",
    "transformers_version": "who wrote the file",
    "initializer_range": "training only",
    "use_cache": "a default of another library's generate()",
    "torch_dtype": "the stored dtypes are read from the tensors",
    "dtype": "the stored dtypes are read from the tensors",
    "attention_dropout": "training only",
    "output_attentions": "what another library returns besides logits",
    "output_hidden_states": "what another library returns besides logits",
    "return_dict": "what another library returns besides logits",
    "gradient_checkpointing": "training only",
    "chunk_size_feed_forward": "tiling, same result",
    "id2label": "classification heads only",
    "label2id": "classification heads only",
    "problem_type": "classification heads only",
    "attn_implementation": "how another library computes the same attention",
    "_attn_implementation_autoset": "how another library computes the same attention",
    "_attn_implementation_internal": "how another library computes the same attention",
    "torchscript": "how another library exports its classes",
    "use_bfloat16": "a wish of another library about computing; tensors have their own dtype",
    "tf_legacy_loss": "training only",
    "classifier_dropout": "classification heads only",
    "finetuning_task": "classification heads only",
    "task_specific_params": "defaults of another library's pipelines",
    "tokenizer_class": "the tokenizer's own files decide",
    "prefix": "text that another library's pipelines put first",
    "sep_token_id": "read by no decoder",
    "unk_token_id": "read by no decoder",
    "cls_token_id": "read by no decoder",
    "decoder_start_token_id": "encoder-decoder models only",
    "cross_attention_hidden_size": "encoder-decoder models only",
    "tie_encoder_decoder": "encoder-decoder models only",
    "unsloth_version": "which tool trained it",
    "unsloth_fixed": "mark of a training tool",
    "unsloth_training_tiled_mlp": "how a training tool computed the same MLP",
    "model_name": "what somebody calls it",
    "resid_pdrop": "training only",
    "residual_dropout": "training only",
    "embd_pdrop": "training only",
    "hidden_dropout": "training only",
    "hidden_dropout_prob": "training only",
    # Sampling defaults that older files carry beside the architecture; generation_config.json and
    # the request decide.
    **dict.fromkeys(
        (
            "max_length", "max_new_tokens", "min_length", "do_sample", "early_stopping",
            "num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p",
            "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
            "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences",
            "output_scores", "return_dict_in_generate", "forced_bos_token_id",
            "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty",
            "suppress_tokens", "begin_suppress_tokens",
        ),
        "a default of another library's generate()",
    ),
}  # fmt: skip


# Fields that are harmless with one value only, wherever they stand.
_HARMLESS_VALUES: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "pruned_heads": ({}, None),
    "use_sliding_window": (False, None),
}


# No size of a model comes near these; a file that says more wants to exhaust memory.
MAX_INTEGER = 2**31 - 1


MAX_LAYERS = 4096


_MAX_NUMBER = 1e300


class FieldReader:
    """Takes fields out of one JSON object; `finish` proves that none was overlooked.

    Mutable on purpose and short-lived: one per object that is read.
    """

    def __init__(self, fields: object, where: str) -> None:
        if not isinstance(fields, dict):
            raise CheckpointError(f"{where}: an object was expected")
        self._fields = dict(fields)
        self._where = where

    def integer(self, name: str, default: int | None = None) -> int:
        """A whole number of at least 0; required unless a default is given."""
        value = self._take(name, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is not int or not 0 <= value <= MAX_INTEGER:
            raise CheckpointError(
                f"{self._where}.{name}: a whole number was expected: {shown(value)}"
            )
        return value

    def positive(self, name: str, default: int | None = None) -> int:
        """Read a whole number of at least 1."""
        value = self.integer(name, default)
        if value == 0:
            raise CheckpointError(f"{self._where}.{name}: must not be 0")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number; required unless a default is given."""
        value = self._take(name, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        # A whole number may be too large for a float; infinity is none of ours anyway.
        if not is_number or not abs(value) <= _MAX_NUMBER:
            raise CheckpointError(f"{self._where}.{name}: a number was expected: {shown(value)}")
        return float(value)

    def within(
        self, name: str, least: float, most: float = math.inf, default: float | None = None
    ) -> float:
        """A finite number of at least `least` and at most `most`."""
        value = self.number(name, default)
        if not least <= value <= most:
            bounds = f"at least {least:g}" + (f" and at most {most:g}" if most < math.inf else "")
            raise CheckpointError(f"{self._where}.{name} = {value:g}: must be {bounds}")
        return value

    def optional(self, name: str) -> Any:
        """Read whatever stands in a field; None if nothing does."""
        return self._fields.pop(name, None)

    def must_be(self, name: str, *allowed: Any, default: Any = None) -> Any:
        """A field of which we implement only some values; absence means `default`."""
        value = self._fields.pop(name, None)
        value = default if value is None else value
        if value not in allowed:
            wanted = " or ".join(map(repr, allowed))
            raise CheckpointError(
                f"{self._where}.{name} = {shown(value)} is not implemented, only {wanted}"
            )
        return value

    def finish(self, ignored: dict[str, str]) -> None:
        """Refuse what is left, unless it is listed as harmless."""
        harmless = {name for name, allowed in _HARMLESS_VALUES.items() if self._is(name, allowed)}
        left = sorted(set(self._fields) - set(ignored) - harmless)
        if left:
            some = ", ".join(f"{name[:60]} = {shown(self._fields[name])}" for name in left[:4])
            more = f" and {len(left) - 4} more" if len(left) > 4 else ""
            raise CheckpointError(
                f"{self._where}: unknown field that may change results: {some}{more}. If it is "
                "harmless it belongs in a list of halfbyte.checkpoint.fields, with the reason"
            )

    def _is(self, name: str, allowed: tuple[Any, ...]) -> bool:
        return any(self._fields.get(name) == value for value in allowed)

    def _take(self, name: str, default: Any) -> Any:
        value = self._fields.pop(name, None)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"{self._where} lacks {name}")
        return value
