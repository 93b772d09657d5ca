"""How answers are sampled where a request does not say: the checkpoint's own recommendation.

Source: the fields of transformers' generation_config.json that change which token is drawn.
"""

from dataclasses import dataclass, fields
from pathlib import Path

from halfbyte.errors import CheckpointError, in_words, shown
from halfbyte.files import is_there, parse_json_text, read_bounded

_FILE = "generation_config.json"


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """Values for the fields of the same names; without a recommendation those of OpenAI's API."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


# The same bounds as on the wire.
_BOUNDS = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "top_k": (-1, 2**31 - 1),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
}


def read_sampling(directory: Path) -> SamplingDefaults:
    """The defaults that a checkpoint's generation_config.json recommends; ours where it is silent.

    `do_sample` is passed over: transformers writes `false` into files that nobody thought about.

    Raises CheckpointError for a value that no request could have.
    """
    path = directory / _FILE
    if not is_there(path):
        return SamplingDefaults()
    try:
        told = parse_json_text(read_bounded(path).decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {in_words(error)}") from error
    if not isinstance(told, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    values: dict[str, float] = {}
    for one in fields(SamplingDefaults):
        value = told.get(one.name)
        if value is None:
            continue
        low, high = _BOUNDS[one.name]
        # Compared before anything is computed with it: a whole number may be too large for a float.
        is_number = type(value) in (int, float) and low <= value <= high
        if (
            not is_number
            or (one.name == "top_p" and value == 0)
            or (one.name == "top_k" and not float(value).is_integer())
        ):
            raise CheckpointError(
                f"{path}: {one.name} is {shown(value)}; it must be a number in [{low}, {high}]. "
                "Correct the file, or leave it aside with --generation-config none"
            )
        values[one.name] = max(int(value), 0) if one.name == "top_k" else float(value)
    return SamplingDefaults(**values)  # type: ignore[arg-type]
