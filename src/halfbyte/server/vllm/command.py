"""How vLLM is started on a checkpoint: the flags that this model's files call for. Pure.

Names and meanings of the flags are those of vLLM 0.20 to 0.25. `halfbyte serve --engine vllm` runs
the command with our server in front of it; `--print` shows it.
"""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from halfbyte.chat.processor import processor_files
from halfbyte.chat.tekken_export import hub_tokenizer, needs_hub_tokenizer
from halfbyte.chat.tokens import ChatFormat
from halfbyte.checkpoint.metadata import is_native, read_config
from halfbyte.errors import UsageError

# The one vLLM parser pair for control tokens of Mistral's tokenizer files.
_MISTRAL = "mistral"
_BLIND = (
    "vLLM cannot place pictures without a tokenizer.json, so that none are taken: serve with "
    "--engine vllm, which makes the file in a folder of links, or quantize again"
)


@dataclass(frozen=True, slots=True)
class VllmOptions:
    """What the user chose of vLLM's options; the rest follows from the checkpoint.

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
    """The command as flags, and what the user should know before running it.

    control_names  names of control tokens that vLLM's tokenizer would find in typed text
    thought_marks  what begins and ends a thought, where no parser of vLLM takes it out
    """

    directory: Path
    flags: Mapping[str, Any]
    warnings: tuple[str, ...]
    control_names: tuple[str, ...] = ()
    thought_marks: tuple[str, str] | None = None

    def command(self) -> list[str]:
        """The words of the command that starts vLLM."""
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
        """The command as a shell takes it, one flag a line."""
        words = [shlex.quote(word) for word in self.command()]
        lines = [" ".join(words[:3])]
        for word in words[3:]:
            if word.startswith("--"):
                lines.append(f"  {word}")
            else:
                lines[-1] += f" {word}"
        return " \\\n".join(lines)

    def config(self) -> str:
        """The flags as a file for `vllm serve --config FILE`."""
        return yaml.safe_dump({"model": str(self.directory), **self.flags}, sort_keys=False)


def plan_vllm(directory: Path, chat: ChatFormat, options: VllmOptions) -> VllmPlan:
    """The flags for a checkpoint. Raises CheckpointError or UsageError."""
    config, _, _ = read_config(directory)
    _check_split(options, config.text.num_heads, config.text.num_kv_heads, config.text.num_layers)
    reading = _format_flags(directory, has_pictures=config.vision is not None)
    is_tekken = reading.get("tokenizer-mode") == _MISTRAL
    flags: dict[str, Any] = {
        "served-model-name": options.name,
        "host": "127.0.0.1",
        "port": options.port,
        **reading,
    }
    if chat.control.has_tools:
        flags |= {"enable-auto-tool-choice": True, "tool-call-parser": _MISTRAL}
    marks = None
    if chat.control.has_thinking:
        ends = (chat.control.think or 0, chat.control.end_think or 0)
        start, end = (chat.vocabulary.piece(token_id) for token_id in ends)
        # Before vLLM 0.27 its parser takes no tokenizer but mistral-common's: it ends at the start.
        if is_tekken:
            flags["reasoning-parser"] = _MISTRAL
        else:
            marks = (start, end)
        flags["reasoning-config"] = {"reasoning_start_str": start, "reasoning_end_str": end}
    warnings = _warnings(directory, config.text.rope)
    if config.vision is not None:
        is_blind = lacks_hub_tokenizer(directory)
        flags["limit-mm-per-prompt"] = {"image": 0 if is_blind else options.max_images}
        if is_blind:
            warnings.append(_BLIND)
    flags |= {
        # The library that our own server uses: the same schemas are accepted and refused.
        "structured-outputs-config": {"backend": "guidance"},
        # Sampling defaults are the API's, not those of generation_config.json.
        "generation-config": "vllm",
        "enable-prompt-tokens-details": True,
        "disable-uvicorn-access-log": True,
    }
    flags |= _machine_flags(options)
    names = () if is_tekken else tuple(chat.vocabulary.control)
    return VllmPlan(directory, flags, tuple(warnings), names, marks)


def lacks_hub_tokenizer(directory: Path) -> bool:
    """Whether vLLM could not place pictures in a prompt of this checkpoint, which has a tower.

    In the hub's layout its model class asks the processor for the text of an image token, and
    mistral-common never makes a control token of text. Of Mistral's own layout it asks otherwise.
    """
    return not is_native(directory) and needs_hub_tokenizer(
        path.name for path in directory.iterdir()
    )


def completed(directory: Path, into: Path) -> Path:
    """A folder of links to a checkpoint's files, and beside them what `lacks_hub_tokenizer` misses.

    Raises CheckpointError if no tokenizer can be made of its tekken.json.
    """
    config, _, _ = read_config(directory)
    assert config.vision is not None
    made = hub_tokenizer(directory / "tekken.json")
    for name, content in processor_files(config.vision, with_tokens=True).items():
        made[name] = json.dumps(content, indent=2).encode()
    for path in directory.iterdir():
        (into / path.name).symlink_to(path.resolve())
    for name, file in made.items():
        if not (into / name).exists():
            (into / name).write_bytes(file)
    return into


def _format_flags(directory: Path, *, has_pictures: bool) -> dict[str, Any]:
    """Which files are read. Said outright, as vLLM prefers Mistral's own layout if it sees it."""
    if is_native(directory):
        return {"config-format": "mistral", "load-format": "mistral", "tokenizer-mode": "mistral"}
    flags = {"config-format": "hf", "load-format": "safetensors"}
    if (directory / "tekken.json").exists():
        # Left to itself, vLLM takes mistral-common wherever it sees this file.
        reads_text = has_pictures and not lacks_hub_tokenizer(directory)
        flags["tokenizer-mode"] = "hf" if reads_text else _MISTRAL
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
