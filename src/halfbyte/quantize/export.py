"""What the finished checkpoint holds, in Model Optimizer's layout: tensors, configs, other files.

Shapes and names only; `checkpoint.writer` keeps the bytes and `pipeline` computes them.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from halfbyte.chat.processor import processor_files
from halfbyte.chat.tekken_export import hub_tokenizer, needs_hub_tokenizer
from halfbyte.checkpoint.fp8_source import OF_VISION
from halfbyte.checkpoint.identity import MANIFEST_NAME
from halfbyte.checkpoint.inventory import expected_tensors
from halfbyte.checkpoint.metadata import Quantization
from halfbyte.checkpoint.names import Layout, foreign_name
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.checkpoint.shard_plan import Shapes
from halfbyte.checkpoint.shards import read_header
from halfbyte.checkpoint.writer import MAX_COPIED_BYTES
from halfbyte.checkpoint.written_metadata import modelopt_configs
from halfbyte.errors import CheckpointError, in_words
from halfbyte.files import open_regular, parse_json_text, read_bounded
from halfbyte.log import logger
from halfbyte.modules import decoder_linears
from halfbyte.recipe.plan import Plan

_GENERATION = "generation_config.json"
_SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
# Sampling that a model's makers recommend and its files do not carry, by layers and width: Mistral
# Medium 3.5, as its card says for reasoning. Servers take it where a request says nothing.
_RECOMMENDED = {(88, 12288): {"temperature": 0.7, "top_p": 0.95}}

# Files of the source that go along: tokenizer, chat template, generation and processor configs.
_COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*")
# ... and those that do not: what we write ourselves, and params.json, beside which some engines
# would look for native weights (docs/reference/formats.md#what-serving-engines-expect); and hashes
# of the source's files, which are not those of these.
_NOT_COPIED = (
    "config.json",
    "hf_quant_config.json",
    "params.json",
    "model.safetensors.index.json",
    "consolidated.safetensors.index.json",
    MANIFEST_NAME,
    "SHA256.json",
)
_SAMPLES = 64
_SAMPLE_BYTES = 4096


def export_layout(checkpoint: Checkpoint) -> Layout:
    """The spelling of the export: the source's own, or the hub's for native sources."""
    if checkpoint.layout != "mistral":
        return checkpoint.layout
    return "hf" if checkpoint.config.vision is not None else "hf-text"


def export_name(name: str, layout: Layout) -> str:
    """The name in the export of canonical tensor `name`."""
    return foreign_name(name, layout, "modelopt")


def export_tensors(checkpoint: Checkpoint, plan: Plan) -> Shapes:
    """Canonical name -> shape and dtype of every tensor of the export, in model order."""
    quantization = Quantization("modelopt", plan.formats, plan.kv_cache)
    expected = expected_tensors(checkpoint.config, quantization)
    return {name: want.stored for name, want in expected.items()}


def passed_through(checkpoint: Checkpoint, plan: Plan) -> list[str]:
    """Canonical names of the tensors outside the decoder layers, which are copied bit for bit."""
    quantized = {"head.weight"} if "head" in plan.formats else set()
    names = (name for name in checkpoint.names() if not name.startswith("decoder."))
    return [name for name in names if name not in quantized]


def layer_tensors(checkpoint: Checkpoint, layer: int) -> list[str]:
    """Canonical names of the source's tensors of a decoder layer."""
    return [name for name in checkpoint.names() if name.startswith(f"decoder.{layer}.")]


def layer_norms(checkpoint: Checkpoint, layer: int) -> list[str]:
    """Canonical names of the tensors of a decoder layer that belong to no linear."""
    linears = {linear.name for linear in decoder_linears(checkpoint.config)}
    prefix = f"decoder.{layer}."
    names = layer_tensors(checkpoint, layer)
    scales = (f"{prefix}attention.k_scale", f"{prefix}attention.v_scale")
    return [n for n in names if n.rpartition(".")[0] not in linears and n not in scales]


def export_files(checkpoint: Checkpoint, plan: Plan) -> dict[str, bytes]:
    """Content of the small files of the export: both configs, and what the source carries."""
    files: dict[str, bytes] = {}
    for path in sorted(checkpoint.directory.iterdir()):
        if path.name in _NOT_COPIED or path.suffix == ".safetensors" or path.is_dir():
            continue
        if checkpoint.config.vision is None and path.name in OF_VISION:
            continue
        if any(path.match(pattern) for pattern in _COPIED):
            try:
                files[path.name] = read_bounded(path, MAX_COPIED_BYTES)
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be copied ({error.strerror})") from error
        elif not path.name.startswith("."):
            logger.info("not copied: %s", path.name)
    config, older = modelopt_configs(
        checkpoint.raw_config, plan.formats, plan.kv_cache, export_layout(checkpoint)
    )
    if (generation := _with_sampling(checkpoint, files.get(_GENERATION))) is not None:
        files[_GENERATION] = generation
    for name, content in _made_for_servers(checkpoint, files.keys()).items():
        files[name] = _json(content)
    for name, text in _hub_tokenizer(checkpoint, files).items():
        files.setdefault(name, text)
    files["config.json"] = _json(config)
    files["hf_quant_config.json"] = _json(older)
    return files


def _with_sampling(checkpoint: Checkpoint, there: bytes | None) -> bytes | None:
    """generation_config.json with the model's recommended sampling, where the source has none.

    None if there is nothing to add. Raises CheckpointError for a file that is no JSON object.
    """
    text = checkpoint.config.text
    recommended = _RECOMMENDED.get((text.num_layers, text.width))
    if recommended is None:
        return None
    told: Any = _generation_tokens(checkpoint)
    if there is not None:
        try:
            told = parse_json_text(there.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{_GENERATION} is not JSON: {in_words(error)}") from error
        if not isinstance(told, dict):
            raise CheckpointError(f"{_GENERATION} must hold a JSON object")
    if any(told.get(name) is not None for name in _SAMPLING_FIELDS):
        return None
    return _json({**told, **recommended})


def _generation_tokens(checkpoint: Checkpoint) -> dict[str, Any]:
    text = checkpoint.config.text
    eos = text.eos_token_ids
    tokens = {
        "bos_token_id": text.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos),
        "pad_token_id": text.pad_token_id,
    }
    return {key: value for key, value in tokens.items() if value is not None}


def _made_for_servers(checkpoint: Checkpoint, there: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Files that servers ask for and the source lacks, as native sources do."""
    vision, names = checkpoint.config.vision, set(there)
    made: dict[str, dict[str, Any]] = {}
    if _GENERATION not in names:
        made[_GENERATION] = _generation_tokens(checkpoint)
    if vision is None:
        return made
    # A hub source's own tokenizer decides what its images are, unless Tekken is all that it has.
    has_none = not names & {"preprocessor_config.json", "processor_config.json"}
    has_tekken_only = needs_hub_tokenizer(names)
    is_ours_to_say = has_tekken_only or (has_none and checkpoint.layout == "mistral")
    for name, content in processor_files(vision, with_tokens=is_ours_to_say).items():
        if has_none or (has_tekken_only and name not in names):
            made[name] = content
    return made


def _hub_tokenizer(checkpoint: Checkpoint, there: Iterable[str]) -> dict[str, bytes]:
    """What vLLM needs to place pictures in a prompt, where the source has a tekken.json alone."""
    if checkpoint.config.vision is None or not needs_hub_tokenizer(there):
        return {}
    try:
        return hub_tokenizer(checkpoint.directory / "tekken.json")
    except CheckpointError as error:
        logger.warning("no tokenizer.json is made, so vLLM cannot take pictures: %s", error)
        return {}


def _json(value: Mapping[str, Any]) -> bytes:
    # A half surrogate pair, which a JSON file may hold and UTF-8 may not, is escaped again.
    return json.dumps(value, indent=4, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


def source_fingerprint(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """File name -> size and SHA-256 of what identifies each file of the source.

    Small files are hashed whole; of a shard its header and 64 evenly spaced pieces of 4 KB, since
    hashing 130 GB would take as long as reading them. So a fingerprint tells checkpoints apart but
    does not prove that a shard is undamaged; the hashes of the manifest do that for the output.
    """
    shards = {checkpoint.shard(name) for name in checkpoint.names()}
    directory = checkpoint.directory
    configs = [directory / name for name in ("config.json", "params.json")]
    found = sorted({*shards, *(path for path in configs if path.exists())})
    return {path.name: _fingerprint(path, is_shard=path in shards) for path in found}


def _fingerprint(path: Path, *, is_shard: bool) -> dict[str, Any]:
    digest = hashlib.sha256()
    num_bytes = path.stat().st_size
    if is_shard:
        read_header(path)  # a shard that was cut off is an error of its own
        step = max(1, num_bytes // _SAMPLES)
        with open_regular(path) as file:
            digest.update(file.read(8 + int.from_bytes(file.read(8), "little")))
            for start in range(0, num_bytes, step):
                file.seek(start)
                digest.update(file.read(_SAMPLE_BYTES))
    else:
        digest.update(read_bounded(path))
    return {"bytes": num_bytes, "sha256": digest.hexdigest()}
