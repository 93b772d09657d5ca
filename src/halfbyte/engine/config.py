"""How the open values of the engine's configuration (`options`) are decided.

`resolve` turns what the user said and what the machine has into a configuration without open
values; that one is printed and shown.
"""

import math
from dataclasses import replace

import torch

from halfbyte.config import TextConfig
from halfbyte.engine.cache import bytes_per_token
from halfbyte.engine.options import EngineConfig as EngineConfig
from halfbyte.errors import CapacityError, UsageError
from halfbyte.log import logger
from halfbyte.machine import available_bytes
from halfbyte.modules import CacheFormat

# Share of the free memory of a machine without a GPU that the KV cache may take unasked.
_CPU_SHARE = 0.25
# `speculative` that needs no draft model.
NGRAM = "ngram"
# More guesses a step than this are worth it for no text.
_MOST_SPECULATIVE_TOKENS = 64


def resolve(
    config: EngineConfig,
    text: TextConfig,
    stored: CacheFormat,
    free_bytes: int,
    *,
    draft_token_bytes: int = 0,
) -> EngineConfig:
    """Decide every value of a configuration that was left open.

    text               the architecture, or a rank's part of it
    stored             the cache format that the checkpoint names
    free_bytes         memory that the KV cache may take
    draft_token_bytes  what a draft model keeps of each position besides
    Raises UsageError for values that contradict each other or the model, CapacityError if the
    cache that they need does not fit.
    """
    _validate(config, text)
    format = stored if config.kv_cache == "auto" else config.kv_cache
    block_bytes = (bytes_per_token(text, format) + draft_token_bytes) * config.block_tokens
    affordable = free_bytes // block_bytes * config.block_tokens
    longest = config.max_model_len or text.max_positions
    if affordable == 0:
        raise CapacityError(
            f"the KV cache needs {_mb(block_bytes)} for one block of {config.block_tokens} tokens; "
            f"{_mb(free_bytes)} are free after the weights"
        )
    cache_tokens = config.kv_cache_tokens or min(affordable, longest * config.max_sequences)
    cache_tokens = -(-cache_tokens // config.block_tokens) * config.block_tokens
    if cache_tokens > affordable:
        raise CapacityError(
            f"a KV cache of {cache_tokens} tokens needs {_mb(cache_tokens, block_bytes, config)}; "
            f"{_mb(free_bytes)} are free after the weights, enough for {affordable} tokens"
        )
    if config.max_model_len is not None and config.max_model_len > cache_tokens:
        raise CapacityError(
            f"one sequence of max_model_len {longest} tokens needs "
            f"{_mb(longest, block_bytes, config)} of KV cache; it holds {cache_tokens} tokens "
            f"({_mb(cache_tokens, block_bytes, config)}); lower max_model_len"
        )
    if longest > cache_tokens:
        logger.warning(
            "the KV cache holds %d tokens, so sequences are limited to them instead of the "
            "model's %d",
            cache_tokens,
            longest,
        )
    return replace(
        config,
        mode=with_mode(config).mode,
        kv_cache=format,
        kv_cache_tokens=cache_tokens,
        max_model_len=min(longest, cache_tokens),
        num_speculative_tokens=_num_speculative_tokens(config),
    )


def with_mode(config: EngineConfig) -> EngineConfig:
    """Decide the mode of a model that does not run on the kernels of a GPU.

    `fp8_declared` where it is said by what FP8 linears round their activations, else `weight_only`.
    """
    if config.mode != "auto":
        return config
    rounds = config.fp8_activations != "auto"
    return replace(config, mode="fp8_declared" if rounds else "weight_only")


def free_cache_bytes(config: EngineConfig) -> int:
    """Bytes that one rank's KV cache may take now that its weights are loaded."""
    device = torch.device(config.device)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return max(int(free - (1.0 - config.gpu_memory_utilization) * total), 0)
    available = available_bytes()
    # Systems that do not say get a modest cache.
    available = 4 << 30 if available is None else available
    return int(available * _CPU_SHARE / config.tensor_parallel_size)


def _validate(config: EngineConfig, text: TextConfig) -> None:
    if config.max_model_len is not None and not 2 <= config.max_model_len <= text.max_positions:
        raise UsageError(
            f"max_model_len {config.max_model_len} must be between 2 and the model's "
            f"{text.max_positions} positions"
        )
    for name in ("max_sequences", "block_tokens", "kv_cache_tokens"):
        value: int | None = getattr(config, name)
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}; it must be at least 1")
    if config.max_batch_tokens < config.max_sequences:
        raise UsageError(
            f"max_batch_tokens {config.max_batch_tokens} must be at least max_sequences "
            f"{config.max_sequences}, so that every running answer gets a token in each step"
        )
    if not 0.0 < config.gpu_memory_utilization <= 1.0:
        raise UsageError(f"gpu_memory_utilization {config.gpu_memory_utilization} is not in (0, 1]")
    if config.fp8_activations != "auto" and config.mode == "weight_only":
        raise UsageError(
            f"fp8_activations {config.fp8_activations} with mode weight_only, in which no linear "
            "rounds its activations; leave one of them out"
        )
    if config.collective_timeout_s <= 0.0:
        raise UsageError(f"collective_timeout_s {config.collective_timeout_s} must be above 0")
    gap_ms = config.target_gap_ms
    if not isinstance(gap_ms, str) and not 0 < gap_ms < math.inf:
        raise UsageError(f"target_gap_ms {gap_ms} must be a number of milliseconds above 0")
    guesses = config.num_speculative_tokens
    if guesses is not None and config.speculative is None:
        raise UsageError(
            f"num_speculative_tokens {guesses} without speculative; give ngram or the directory of "
            "an EAGLE head"
        )
    if guesses is not None and not 1 <= guesses <= _MOST_SPECULATIVE_TOKENS:
        raise UsageError(
            f"num_speculative_tokens {guesses} must be between 1 and {_MOST_SPECULATIVE_TOKENS}; "
            "leave speculative out for none"
        )


def draft_directory(config: EngineConfig) -> str | None:
    """The folder of the draft model; None if the configuration names none."""
    return None if config.speculative == NGRAM else config.speculative


def _num_speculative_tokens(config: EngineConfig) -> int | None:
    """Guesses a step: texts repeat themselves for long, a draft model is sure of a few tokens."""
    if config.speculative is None:
        return None
    return config.num_speculative_tokens or (8 if config.speculative == NGRAM else 3)


def _mb(amount: int, block_bytes: int | None = None, config: EngineConfig | None = None) -> str:
    """Bytes, or the bytes of so many cached tokens, in MB."""
    if block_bytes is not None and config is not None:
        amount = -(-amount // config.block_tokens) * block_bytes
    return f"{amount / 1e6:,.1f} MB"
