"""`quantization_config` as llm-compressor writes it (`quant_method: compressed-tensors`), FP8 only.

One scheme for all quantized linears: e4m3 weights with a scale of the tensor or of each row, and
activations rounded by each token's largest value (`dynamic`, strategy `token`) or by a stored scale
of the tensor. Weights of 4 bits, blocks and groups are refused by name.

Source: compressed-tensors' published `QuantizationConfig`, `QuantizationScheme` and
`QuantizationArgs`.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from halfbyte.checkpoint.strict_fields import FieldReader, Fields
from halfbyte.errors import CheckpointError, shown

METHOD = "compressed-tensors"
_IGNORED = {
    "version": "who wrote it",
    "quantization_status": "how far a tool had come; the tensors are there",
    "global_compression_ratio": "a figure for people",
}
_IGNORED_ARGUMENTS = {
    "observer": "how scales were found",
    "observer_kwargs": "how scales were found",
    "scale_dtype": "the stored dtypes are read from the tensors",
    "zp_dtype": "there are no zero points",
}


@dataclass(frozen=True, slots=True)
class CompressedFacts:
    """What llm-compressor's config says of weights, inputs and the cache.

    has_row_scales   a weight has a scale of each row, not one of all
    has_input_scale  activations have a stored scale, not one of each token
    kv_is_fp8        each layer has a k_scale and a v_scale
    targets, kept    modules that are quantized, and those of them that are not: names, class names
                     or, behind "re:", patterns
    """

    has_row_scales: bool
    has_input_scale: bool
    kv_is_fp8: bool
    targets: tuple[str, ...]
    kept: tuple[str, ...]

    def covers(self, spellings: Iterable[str]) -> bool:
        """Whether a linear of one of these module names is quantized."""
        names = tuple(spellings)
        return _is_named(names, self.targets) and not _is_named(names, self.kept)


def compressed_facts(stated: Fields) -> CompressedFacts:
    """Read the object strictly; CheckpointError names what is not implemented."""
    where = "quantization_config"
    fields = FieldReader(stated, where)
    fields.must_be("quant_method", METHOD)
    fields.must_be("format", "float-quantized", "naive-quantized", default="float-quantized")
    groups = fields.optional("config_groups")
    kept = _names(fields.optional("ignore") or [], f"{where}.ignore")
    scheme = fields.optional("kv_cache_scheme")
    if scheme is not None:
        _arguments(scheme, f"{where}.kv_cache_scheme", strategies=("tensor",), dynamic=(False,))
    for name in ("sparsity_config", "transform_config"):
        left = fields.optional(name)
        if left not in (None, {}, {"format": "dense"}):
            raise CheckpointError(f"{where}.{name} = {shown(left)} is not implemented, only null")
    fields.finish(_IGNORED)
    if not isinstance(groups, dict) or not groups:
        raise CheckpointError(f"{where}.config_groups: at least one group was expected")
    read = [_group(group, f"{where}.config_groups.{name}") for name, group in groups.items()]
    kinds = {(has_rows, has_input) for has_rows, has_input, _ in read}
    if len(kinds) > 1:
        raise CheckpointError(
            f"{where}.config_groups: {len(read)} groups of unlike scales; one scheme for all "
            "quantized linears is implemented"
        )
    ((has_row_scales, has_input_scale),) = kinds
    targets = tuple(target for _, _, names in read for target in names)
    return CompressedFacts(has_row_scales, has_input_scale, scheme is not None, targets, kept)


def _group(group: Any, where: str) -> tuple[bool, bool, tuple[str, ...]]:
    """Whether weights have scales of rows, and inputs stored ones; and whom it is about."""
    fields = FieldReader(group, where)
    targets = _names(fields.optional("targets"), f"{where}.targets")
    weights = fields.optional("weights")
    strategy, _ = _arguments(weights, f"{where}.weights", ("channel", "tensor"), (False,))
    inputs = fields.optional("input_activations")
    if inputs is None:
        raise CheckpointError(
            f"{where}.input_activations = null is not implemented: FP8 linears round their input"
        )
    how, is_dynamic = _arguments(
        inputs, f"{where}.input_activations", ("token", "tensor"), (True, False)
    )
    if (how == "token") != is_dynamic:
        raise CheckpointError(
            f"{where}.input_activations: strategy {how} with dynamic {str(is_dynamic).lower()} is "
            "not implemented; tokens are dynamic, tensors are not"
        )
    fields.must_be("output_activations", None)
    fields.must_be("format", None, "float-quantized", "naive-quantized")
    fields.finish({})
    return strategy == "channel", not is_dynamic, targets


def _arguments(
    arguments: Any, where: str, strategies: tuple[str, ...], dynamic: tuple[bool, ...]
) -> tuple[str, bool]:
    """Strategy and dynamism of FP8 values."""
    fields = FieldReader(arguments, where)
    fields.must_be("num_bits", 8)
    fields.must_be("type", "float")
    fields.must_be("symmetric", True, default=True)
    fields.must_be("group_size", None)
    fields.must_be("block_structure", None)
    fields.must_be("actorder", None)
    strategy: str = fields.must_be("strategy", *strategies)
    is_dynamic: bool = fields.must_be("dynamic", *dynamic, default=False)
    fields.finish(_IGNORED_ARGUMENTS)
    return strategy, is_dynamic


def _names(names: Any, where: str) -> tuple[str, ...]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{where}: a list of names was expected: {shown(names)}")
    return tuple(names)


def _is_named(spellings: tuple[str, ...], names: tuple[str, ...]) -> bool:
    """Whether one of these, "Linear" or a pattern names a linear of these spellings."""
    for name in names:
        if name == "Linear" or name in spellings:
            return True
        if not name.startswith("re:"):
            continue
        try:
            if any(re.match(name[3:], spelling) for spelling in spellings):
                return True
        except re.error as error:
            raise CheckpointError(
                f"quantization_config: {name[:60]} is no pattern ({error})"
            ) from error
    return False
