"""Proves that a checkpoint is whole and consistent, alone or against its source.

Every finding is a Problem that names the file or tensor; nothing is repaired. What a value may be
is checked in `verify_values`; here is what can be told from files, metadata and scales. Called by
`halfbyte verify`.

Rules: docs/reference/formats.md, #the-two-json-files, #tensors-of-a-quantized-linear,
#edge-cases and #what-serving-engines-expect.
"""

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from halfbyte.checkpoint.fp8_source import COMPANION_FILES, OF_VISION
from halfbyte.checkpoint.identity import MANIFEST_NAME
from halfbyte.checkpoint.manifest import (
    Manifest,
    hash_file,
    hash_stored,
    read_manifest,
)
from halfbyte.checkpoint.metadata import read_json
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.checkpoint.shards import INDEX_NAME
from halfbyte.checkpoint.soundness import Fault, Severity, faults
from halfbyte.checkpoint.strict_fields import Fields
from halfbyte.checkpoint.verify_values import check_against
from halfbyte.checkpoint.written_metadata import modelopt_configs
from halfbyte.config import ModelConfig, TextConfig, VisionConfig
from halfbyte.errors import CheckpointError
from halfbyte.files import MAX_TOKENIZER_BYTES, is_there
from halfbyte.log import logger
from halfbyte.modules import decoder_linears, fused_partners

Progress = Callable[[int, int], None]  # tensors done, tensors in all


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong. `where` is a tensor's stored name, a file, or a config field.

    An error means that the checkpoint must not be served; a warning, that somebody should look.
    """

    severity: Severity
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.where}: {self.what}"


@dataclass(frozen=True, slots=True)
class Findings:
    """What `verify` has counted, and the problems it has found.

    sqnr_db   canonical linear -> SQNR against the source in dB (inf if equal); empty without one
    """

    num_tensors: int
    num_hashes: int
    problems: tuple[Problem, ...]
    sqnr_db: dict[str, float] = field(default_factory=dict)

    @property
    def is_sound(self) -> bool:
        """Whether nothing was found that must keep it from being served."""
        return not any(problem.severity == "error" for problem in self.problems)


def verify(
    path: str | Path, against: str | Path | None = None, *, progress: Progress | None = None
) -> Findings:
    """Check everything that can be checked about a checkpoint directory.

    against   its source in any dialect: pass-through tensors must be equal, quantized ones within
              what rounding explains

    Never raises for a bad checkpoint: what keeps it from being opened is the report's one problem.
    Raises CheckpointError if the source cannot be opened. Reads every byte once; memory holds a
    few copies of the largest tensor in float32.
    """
    directory = Path(path)
    source = None if against is None else Checkpoint.open(against)
    try:
        return _report(Checkpoint.open(directory), source, progress)
    except CheckpointError as error:
        said = str(error).removeprefix(f"{directory}: ")
        return Findings(0, 0, (Problem("error", str(directory), said),))


def _report(
    checkpoint: Checkpoint, source: Checkpoint | None, progress: Progress | None
) -> Findings:
    manifest = read_manifest(checkpoint.directory)
    problems = [
        *check_files(checkpoint),
        *check_metadata(checkpoint),
        *check_rope(checkpoint.config),
        *check_scales(checkpoint),
        *check_tokenizer(checkpoint, source),
    ]
    if source is not None:
        problems += _check_geometry(checkpoint, source)
    sqnr_db: dict[str, float] = {}
    is_nearest = manifest is None or not _is_by_gptq(manifest)
    names = checkpoint.names()
    for number, name in enumerate(names):
        found = list(faults(name, checkpoint.tensor(name)))
        if source is not None and not any(fault.severity == "error" for fault in found):
            compared = check_against(checkpoint, source, name, is_nearest=is_nearest)
            if compared is not None:
                found += [Fault("error", what) for what in compared.problems]
                if compared.sqnr_db is not None:
                    sqnr_db[name.removesuffix(".weight")] = compared.sqnr_db
        if manifest is not None:
            found += _check_hash(checkpoint, name, manifest.tensors)
        problems += [Problem(severity, checkpoint.foreign(name), what) for severity, what in found]
        if progress is not None:
            progress(number + 1, len(names))
    if manifest is not None:
        problems += _check_manifest(checkpoint, manifest.tensors, manifest.files)
    hashes = 0 if manifest is None else len(manifest.tensors)
    return Findings(len(names), hashes, tuple(problems), sqnr_db)


def _is_by_gptq(manifest: Manifest) -> bool:
    """Whether the checkpoint was made by a method that does not round to nearest."""
    recipe = manifest.made_of.get("recipe")
    scales = recipe.get("scales") if isinstance(recipe, Mapping) else None
    return isinstance(scales, Mapping) and scales.get("weights") == "gptq"


# --- files and metadata


def check_files(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Problems of index sums, and of files that would make an engine read something else."""
    directory = checkpoint.directory
    total = sum(map(checkpoint.num_bytes, checkpoint.names()))
    index = directory / INDEX_NAME
    if is_there(index):
        metadata = read_json(index).get("metadata")
        stated = metadata.get("total_size") if isinstance(metadata, dict) else None
        if stated != total:
            yield Problem(
                "error", INDEX_NAME, f"total_size is {stated}, the tensors have {total}; stale"
            )
    has_native = is_there(directory / "params.json") and any(
        directory.glob("consolidated*.safetensors")
    )
    if checkpoint.layout != "mistral" and has_native:
        yield Problem(
            "error",
            "params.json",
            "with consolidated*.safetensors beside it engines load the native files instead",
        )


def check_metadata(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Problems of an export's two JSON files, against what the tensors say, written anew."""
    directory, quantization = checkpoint.directory, checkpoint.quantization
    raw = checkpoint.raw_config
    if checkpoint.config.vision is not None and "tie_word_embeddings" not in raw:
        yield Problem(
            "warning",
            "config.json",
            "no tie_word_embeddings at the top level: newer libraries take that for true and drop "
            "the head",
        )
    if quantization.dialect != "modelopt":
        return
    if "quantization_config" not in raw:
        yield Problem("error", "config.json", "no quantization_config; engines read only this one")
        return
    wanted = modelopt_configs(raw, quantization.formats, quantization.kv_cache, checkpoint.layout)
    stated = dict(raw["quantization_config"])
    yield from _differences(stated, wanted[0]["quantization_config"], "quantization_config")
    older = directory / "hf_quant_config.json"
    if not is_there(older):
        yield Problem("warning", older.name, "missing; older engines read it")
        return
    yield from _differences(read_json(older), wanted[1], older.name)


def _differences(stated: dict[str, Any], wanted: dict[str, Any], where: str) -> Iterator[Problem]:
    for key in sorted({*stated, *wanted} - {"producer"}):
        if stated.get(key) != wanted.get(key):
            shown = _shorten(wanted.get(key)), _shorten(stated.get(key))
            yield Problem(
                "error", where, f"{key}: the tensors ask for {shown[0]}, the file says {shown[1]}"
            )


def _shorten(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


# Geometry of Mistral Medium 3.5: layers, width, query and KV heads, head size, MLP.
_MEDIUM_35 = (88, 12288, 96, 8, 128, 28672)


def check_rope(config: ModelConfig) -> Iterator[Problem]:
    """Problems of rotary settings that are known to ruin a model.

    Medium 3.5 was first published with `mscale_all_dim` 1, which switches YaRN's attention factor
    off; within days it became 0. Other models of the class rightly carry 1, so only its geometry
    is judged.
    """
    text, rope = config.text, config.text.rope
    if rope.kind != "yarn":
        return
    geometry = (
        text.num_layers, text.width, text.num_heads, text.num_kv_heads, text.head_dim,
        text.mlp_width,
    )  # fmt: skip
    if geometry == _MEDIUM_35 and rope.mscale_all_dim != 0:
        factor = 1 + 0.1 * math.log(rope.factor)
        yield Problem(
            "error",
            "rope_parameters.mscale_all_dim",
            f"is {rope.mscale_all_dim:g}: this is the geometry of Mistral Medium 3.5, which was "
            f"trained with YaRN's attention factor {factor:.3f} and needs 0. Its first release "
            "said 1 by mistake, which ruins long contexts and measures k_scale wrongly. Set it to "
            "0 in config.json of the source and quantize again"
            + ("" if config.vision else "; Devstral 2, a text model, has this geometry, too"),
        )
    reach = rope.factor * rope.original_max_positions
    if text.max_positions > reach:
        yield Problem(
            "warning",
            "max_position_embeddings",
            f"is {text.max_positions}, YaRN stretches {rope.original_max_positions} positions by "
            f"{rope.factor:g} to {reach:g} only",
        )


# What `--accept` may name: settings that are refused because they are known to ruin a model.
ACCEPTABLE = ("mscale_all_dim",)


def require_trusted(config: ModelConfig, accepted: Collection[str] = ()) -> None:
    """Raise CheckpointError with the reason for a setting known to ruin the model.

    accepted   names of fields (`ACCEPTABLE`) whose owner knows better

    For whoever computes with a checkpoint: serving and quantizing.
    """
    for problem in check_rope(config):
        name = problem.where.rpartition(".")[2]
        if problem.severity == "error" and name not in accepted:
            raise CheckpointError(
                f"{problem.where} {problem.what}. If this model really was trained so: "
                f"--accept {name} (serve, chat and quantize)"
            )
        logger.warning("%s %s", problem.where, problem.what)


# --- scales


def check_scales(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Problems of fused groups: one format each, with the scales they must share."""
    for linear in decoder_linears(checkpoint.config):
        partners = fused_partners(linear.name)
        if partners[0] == linear.name and len(partners) > 1:
            yield from _check_group(checkpoint, partners)


def _check_group(checkpoint: Checkpoint, partners: tuple[str, ...]) -> Iterator[Problem]:
    formats = {name: checkpoint.format_of(name) for name in partners}
    first = partners[0]
    if len(set(formats.values())) > 1:
        kinds = ", ".join(f"{name} {kind}" for name, kind in formats.items())
        yield Problem("error", first, f"fused partners in different formats: {kinds}")
        return
    # q, k and v read one input, gate and up likewise; engines take one scale for the group.
    shared = {"bf16": (), "fp8": ("input_scale",), "nvfp4": ("input_scale", "tensor_scale")}
    for role in shared[formats[first]]:
        if f"{first}.{role}" not in checkpoint:
            continue  # each token has its own
        values = {name: checkpoint.scalar(f"{name}.{role}") for name in partners}
        if len(set(values.values())) > 1:
            shown = ", ".join(f"{name} {value:g}" for name, value in values.items())
            # A source may say what it likes: we measure inputs anew. An export is used as it is.
            is_source = checkpoint.quantization.dialect in ("mistral-fp8", "compressed")
            yield Problem(
                "warning" if is_source else "error",
                checkpoint.foreign(f"{first}.{role}"),
                f"differs within its fused group ({shown}); engines take one for all",
            )


# --- tokenizer


def check_tokenizer(checkpoint: Checkpoint, source: Checkpoint | None) -> Iterator[Problem]:
    """Problems of token ids beyond the vocabulary, or of tokenizer files unlike the source's."""
    directory, text = checkpoint.directory, checkpoint.config.text
    text_only = checkpoint.config.vision is None
    if not any(is_there(directory / name) for name in ("tokenizer.json", "tekken.json")):
        yield Problem("warning", str(directory), "no tokenizer.json and no tekken.json")
    tokenizer: Fields = {}
    for name in COMPANION_FILES:
        if name.endswith(".json") and is_there(directory / name):
            try:
                told = read_json(directory / name, MAX_TOKENIZER_BYTES)
            except CheckpointError as error:
                yield Problem("error", str(directory), str(error))
                continue
            if name == "tokenizer.json":
                tokenizer = told
    largest = _largest_token_id(tokenizer)
    if largest is not None and largest >= text.vocab_size:
        yield Problem(
            "error",
            "tokenizer.json",
            f"has token {largest}, the embedding ends at {text.vocab_size - 1}",
        )
    for token in (*text.eos_token_ids, text.bos_token_id, text.pad_token_id):
        if token is not None and token >= text.vocab_size:
            yield Problem("error", "config.json", f"token id {token} is outside the vocabulary")
    if source is not None:
        for name in COMPANION_FILES:
            if text_only and name in OF_VISION:
                continue
            yield from _check_companion(directory / name, source.directory / name)


def require_tokens_in_vocabulary(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for a tokenizer or a config with tokens that have no embedding.

    For whoever makes another checkpoint of this one, which would inherit them.
    """
    for problem in check_tokenizer(checkpoint, None):
        if problem.severity == "error":
            raise CheckpointError(f"{problem.where}: {problem.what}")


def _check_companion(ours: Path, theirs: Path) -> Iterator[Problem]:
    if theirs.is_file() and not ours.is_file():
        yield Problem("error", ours.name, "the source has it, this checkpoint does not")
    elif theirs.is_file() and hash_file(ours) != hash_file(theirs):
        yield Problem("error", ours.name, "is not the source's")


def _largest_token_id(tokenizer: Fields) -> int | None:
    """The largest id of a tokenizer.json; None of one that is not there."""
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    added = tokenizer.get("added_tokens")
    if isinstance(added, list):
        ids += [token.get("id") for token in added if isinstance(token, dict)]
    numbers = [number for number in ids if type(number) is int]
    return max(numbers, default=None)


# --- source and manifest


def _check_geometry(checkpoint: Checkpoint, source: Checkpoint) -> Iterator[Problem]:
    if checkpoint.config != source.config:
        for part in ("text", "vision"):
            ours, theirs = _meaning(checkpoint.config, part), _meaning(source.config, part)
            if part == "vision" and ours is None:
                what = "the source's vision tower is left out; this is a text model"
                yield Problem("warning", "config.json", what)
            elif ours != theirs:
                yield Problem(
                    "error", "config.json", f"{part}: {ours} is not the source's {theirs}"
                )


def _meaning(config: ModelConfig, part: str) -> TextConfig | VisionConfig | None:
    """A part of a config without what says nothing: a length that nothing is counted from.

    The hub's config of a native source states one all the same, for a library that wants it.
    """
    if part == "vision":
        return config.vision
    rope = config.text.rope
    if rope.kind == "default" and rope.llama_4_scaling_beta == 0:
        rope = replace(rope, original_max_positions=0)
    return replace(config.text, rope=rope)


def _check_hash(checkpoint: Checkpoint, name: str, hashes: Any) -> list[Fault]:
    wanted = hashes.get(checkpoint.foreign(name))
    if wanted is None or hash_stored(checkpoint.stored(name)) == wanted:
        return []
    return [Fault("error", f"its bytes are not those that {MANIFEST_NAME} names (sha256 differs)")]


def _check_manifest(checkpoint: Checkpoint, tensors: Any, files: Any) -> Iterator[Problem]:
    stored = {checkpoint.foreign(name) for name in checkpoint.names()}
    for foreign in sorted(stored ^ set(tensors)):
        what = "is not in the manifest" if foreign in stored else "is only in the manifest"
        yield Problem("error", foreign, what)
    for name, digest in sorted(files.items()):
        path = checkpoint.directory / Path(name).name
        if not path.is_file():
            yield Problem("error", name, f"{MANIFEST_NAME} names it, but it is not there")
        elif hash_file(path) != digest:
            yield Problem("error", name, f"was changed after {MANIFEST_NAME} was written")


def format_report(report: Findings) -> str:
    """A few lines for people: what was checked, how close it is, what is wrong."""
    hashed = f"{report.num_hashes} hashes compared" if report.num_hashes else "no manifest"
    lines = [f"{report.num_tensors} tensors read, {hashed}"]
    if report.sqnr_db:
        finite = {name: value for name, value in report.sqnr_db.items() if math.isfinite(value)}
        equal = len(report.sqnr_db) - len(finite)
        text = f"{len(report.sqnr_db)} linears against the source: {equal} equal"
        if finite:
            worst = min(finite, key=lambda name: finite[name])
            middle = sorted(finite.values())[len(finite) // 2]
            text += f", median {middle:.1f} dB, worst {finite[worst]:.1f} dB ({worst})"
        lines.append(text)
    lines += map(str, report.problems)
    errors = sum(problem.severity == "error" for problem in report.problems)
    count = "1 error" if errors == 1 else f"{errors} errors"
    lines.append("sound" if report.is_sound else f"NOT sound: {count}")
    return "\n".join(lines)
