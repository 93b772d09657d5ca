"""How vLLM is started on a checkpoint: the flags that this model's files call for. Pure.

Names and meanings of the flags are those of vLLM 0.20 to 0.24. `halfbyte serve --engine vllm` runs
the command with our server in front of it; `--print` shows it.
"""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from halfbyte.chat.tokens import ChatFormat
from halfbyte.checkpoint.metadata import is_native, read_config
from halfbyte.errors import UsageError

# The one vLLM parser pair for control tokens of Mistral's tokenizer files.
_MISTRAL = "mistral"


@dataclass(frozen=True, slots=True)
class VllmOptions:
    """What the user chose; the rest follows from the checkpoint.

    pipeline_parallel   above 1 the layers are spread over machines, and Ray starts the workers
    max_images          of one request, from our limits
    """

    name: str
    port: int
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    uses_ray: bool = False
    max_model_len: int | None = None
    max_sequences: int | None = None
    gpu_memory_utilization: float | None = None
    max_images: int = 32


@dataclass(frozen=True, slots=True)
class VllmPlan:
    """The command as flags, and what the user should know before running it."""

    directory: Path
    flags: Mapping[str, Any]
    warnings: tuple[str, ...]

    def command(self) -> list[str]:
        """The words of the command."""
        words = ["vllm", "serve", str(self.directory)]
        for name, value in self.flags.items():
            if value is True:
                words.append(f"--{name}")
            elif isinstance(value, dict):
                words += [f"--{name}", json.dumps(value, separators=(",", ":"))]
            else:
                words += [f"--{name}", str(value)]
        return words

    def shell(self) -> str:
        """The command for a shell, a flag a line."""
        words = [shlex.quote(word) for word in self.command()]
        lines = [" ".join(words[:3])]
        for word in words[3:]:
            if word.startswith("--"):
                lines.append(f"  {word}")
            else:
                lines[-1] += f" {word}"
        return " \\\n".join(lines)

    def config(self) -> str:
        """The same as a file for `vllm serve --config FILE`."""
        return yaml.safe_dump({"model": str(self.directory), **self.flags}, sort_keys=False)


def plan_vllm(directory: Path, chat: ChatFormat, options: VllmOptions) -> VllmPlan:
    """The flags for a checkpoint. Raises CheckpointError or UsageError."""
    config, _, _ = read_config(directory)
    _check_split(options, config.text.num_heads, config.text.num_kv_heads, config.text.num_layers)
    flags: dict[str, Any] = {
        "served-model-name": options.name,
        "host": "127.0.0.1",
        "port": options.port,
        **_format_flags(directory),
    }
    if chat.control.has_tools:
        flags |= {"enable-auto-tool-choice": True, "tool-call-parser": _MISTRAL}
    if chat.control.has_thinking:
        flags["reasoning-parser"] = _MISTRAL
        flags["reasoning-config"] = {
            "reasoning_start_str": chat.vocabulary.piece(chat.control.think or 0),
            "reasoning_end_str": chat.vocabulary.piece(chat.control.end_think or 0),
        }
    if config.vision is not None:
        flags["limit-mm-per-prompt"] = {"image": options.max_images}
    flags |= {
        # The library that our own server uses: the same schemas are accepted and refused.
        "structured-outputs-config": {"backend": "guidance"},
        # Sampling defaults are the API's, not those of generation_config.json.
        "generation-config": "vllm",
        "enable-prompt-tokens-details": True,
        "disable-uvicorn-access-log": True,
    }
    flags |= _machine_flags(options)
    return VllmPlan(directory, flags, tuple(_warnings(directory, config.text.rope)))


def _format_flags(directory: Path) -> dict[str, Any]:
    """Which files are read. Said outright, as vLLM prefers Mistral's own layout if it sees it."""
    if is_native(directory):
        return {"config-format": "mistral", "load-format": "mistral", "tokenizer-mode": "mistral"}
    flags = {"config-format": "hf", "load-format": "safetensors"}
    if (directory / "tekken.json").exists():
        flags["tokenizer-mode"] = _MISTRAL
    return flags


def _machine_flags(options: VllmOptions) -> dict[str, Any]:
    flags: dict[str, Any] = {}
    if options.tensor_parallel > 1:
        flags["tensor-parallel-size"] = options.tensor_parallel
    if options.pipeline_parallel > 1:
        flags["pipeline-parallel-size"] = options.pipeline_parallel
    if options.uses_ray or options.pipeline_parallel > 1:
        flags["distributed-executor-backend"] = "ray"
    if options.max_model_len is not None:
        flags["max-model-len"] = options.max_model_len
    if options.max_sequences is not None:
        flags["max-num-seqs"] = options.max_sequences
    if options.gpu_memory_utilization is not None:
        flags["gpu-memory-utilization"] = options.gpu_memory_utilization
    return flags


def _check_split(options: VllmOptions, heads: int, kv_heads: int, layers: int) -> None:
    tensor, pipeline = options.tensor_parallel, options.pipeline_parallel
    if tensor < 1 or heads % tensor or max(tensor, kv_heads) % min(tensor, kv_heads):
        raise UsageError(
            f"--tensor-parallel-size {tensor} does not divide {heads} query heads and {kv_heads} "
            "key heads"
        )
    if not 1 <= pipeline <= layers:
        raise UsageError(f"--pipeline-parallel-size {pipeline}: the model has {layers} layers")


def _warnings(directory: Path, rope: Any) -> list[str]:
    found = []
    if not is_native(directory) and (directory / "params.json").exists():
        found.append("params.json beside config.json: vLLM is told to read config.json")
    if rope.llama_4_scaling_beta:
        found.append(
            f"vLLM does not apply llama_4_scaling_beta {rope.llama_4_scaling_beta:g} of the "
            f"config: from position {rope.original_max_positions} on its answers differ from ours"
        )
    return found
