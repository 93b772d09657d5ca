"""The engine's one configuration, and what each of its values is to a user. No torch.

A field is stated here once: flags of commands, keys of `--config` files and the tables of
docs/cli.md are rendered from it (`cli.engine_flags`, tools/cli_reference.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

from halfbyte.modules import CacheFormat, Fp8Activations, Mode


class Option(NamedTuple):
    """What a field of `EngineConfig` is to a user.

    help          one line for `--help`, which may hold %(default)s
    flag          its flag, as "--max-model-len"; "" where no command has one
    also          other spellings of the flag
    metavar       what stands for the value in `--help`
    flag_default  of the flag, where it differs from the field's
    is_ours       the flag means nothing to another engine behind our server
    """

    help: str
    flag: str = ""
    also: tuple[str, ...] = ()
    metavar: str | None = None
    flag_default: object = None
    is_ours: bool = True


def _told(help: str, flag: str = "", *also: str, **more: Any) -> Mapping[str, Option]:
    return {"option": Option(help, flag, also, **more)}


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How an engine runs a checkpoint. None and "auto" are decided when it is loaded.

    What each field means is stated beside it, for people who give it as a flag.
    """

    max_model_len: int | None = field(
        default=None,
        metadata=_told("most tokens of prompt and answer", "--max-model-len", is_ours=False),
    )
    max_sequences: int = field(
        default=64,
        metadata=_told(
            "answers that run at once (%(default)s)",
            "--max-sequences",
            "--max-num-seqs",
            is_ours=False,
        ),
    )
    max_batch_tokens: int = field(
        default=2048, metadata=_told("tokens of one step, so the largest chunk of a prompt")
    )
    kv_cache_tokens: int | None = field(
        default=None,
        metadata=_told("tokens that the KV cache holds (what memory allows)", "--kv-cache-tokens"),
    )
    block_tokens: int = field(default=16, metadata=_told("tokens in a block of the cache"))
    prefix_cache: bool = field(default=True, metadata=_told("share the blocks of equal beginnings"))
    mode: Mode | Literal["auto"] = field(
        default="auto",
        metadata=_told(
            "what quantized linears compute (auto: fp8_declared on the kernels of a Hopper GPU, "
            "weight_only elsewhere)",
            "--mode",
        ),
    )
    device: str = field(
        default="cpu",
        metadata=_told(
            "cpu, cuda, cuda:1 (auto: a GPU if there is one)", "--device", flag_default="auto"
        ),
    )
    kv_cache: CacheFormat | Literal["auto"] = field(
        default="auto",
        metadata=_told("format of keys and values (auto: as the checkpoint names)", "--kv-cache"),
    )
    gpu_memory_utilization: float = field(
        default=0.9,
        metadata=_told(
            "share of a GPU's memory for weights and cache together (%(default)s)",
            "--gpu-memory-utilization",
            is_ours=False,
        ),
    )
    products: Literal["exact", "fast"] = field(
        default="exact",
        metadata=_told(
            "on a Hopper GPU: NVFP4 layers multiply in 16 bit, or faster in FP8 (%(default)s)",
            "--products",
        ),
    )
    fp8_activations: Fp8Activations = field(
        default="auto",
        metadata=_told(
            "FP8 linears round activations by the checkpoint's scale, or by the largest value of "
            "each token (auto: static where the checkpoint has a scale; --mode auto rounds on a "
            "CPU, too, if this is given)",
            "--fp8-activations",
        ),
    )
    count_saturation: bool = field(
        default=False,
        metadata=_told(
            "count activations that the checkpoint's FP8 scales clip, by linear, text and images "
            "apart, at /metrics; slower",
            "--count-saturation",
        ),
    )
    deterministic: bool = field(
        default=False,
        metadata=_told(
            "on a Hopper GPU: same tokens whatever else is in the batch; slower", "--deterministic"
        ),
    )
    target_gap_ms: float | Literal["balanced", "none"] = field(
        default="balanced",
        metadata=_told(
            "time between the tokens of running answers while prompts are read (balanced: 150 on "
            "the kernels of a Hopper GPU, a third more while several prompts wait, up to twice as "
            "long deep in a long prompt, elsewhere twice what is usual; none: prompts as fast as "
            "they can be read)",
            "--target-gap",
            metavar="MS|balanced|none",
        ),
    )
    accept: tuple[str, ...] = field(
        default=(),
        metadata=_told(
            "compute with this setting of the checkpoint although it is known to ruin the model",
            "--accept",
            is_ours=False,
        ),
    )
    speculative: str | None = field(
        default=None,
        metadata=_told(
            "guess tokens ahead from the text itself, or with an EAGLE head; same answers",
            "--speculative",
            metavar="ngram|DIR",
        ),
    )
    num_speculative_tokens: int | None = field(
        default=None,
        metadata=_told(
            "most guesses a step (8 for ngram, 3 for EAGLE)", "--num-speculative-tokens"
        ),
    )
    adaptive_speculation: bool = field(
        default=True,
        metadata=_told("fewer guesses, down to none, where they cost more than they bring"),
    )
    tensor_parallel_size: int = field(
        default=1,
        metadata=_told("GPUs that share the model", "--tensor-parallel-size", "-tp", is_ours=False),
    )
    collective_timeout_s: float = field(
        default=60.0,
        metadata=_told(
            "seconds that one of several GPUs may wait for another before the engine fails"
        ),
    )

    @property
    def max_pages(self) -> int:
        """Most blocks that one sequence can have; only of a resolved configuration."""
        assert self.max_model_len is not None
        return -(-self.max_model_len // self.block_tokens)

    @property
    def num_pages(self) -> int:
        """Number of blocks of the KV cache; only of a resolved configuration."""
        assert self.kv_cache_tokens is not None
        return self.kv_cache_tokens // self.block_tokens


def options() -> dict[str, Option]:
    """What each field of `EngineConfig` is to a user, in the order of the fields."""
    return {one.name: one.metadata["option"] for one in fields(EngineConfig)}
