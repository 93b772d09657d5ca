"""The entry of programs: a quantization in one call. The command line has `pipeline` instead."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from halfbyte.checkpoint.metadata import read_config
from halfbyte.errors import UsageError
from halfbyte.quantize.job import QuantizeConfig
from halfbyte.quantize.pipeline import QuantizeResult
from halfbyte.quantize.pipeline import quantize as run_quantization
from halfbyte.recipe.fitted import fitted_recipe
from halfbyte.recipe.schema import Recipe, load_recipe


def quantize(
    source: str | Path,
    output: str | Path,
    recipe: str | Path | Recipe | None = None,
    **options: Any,
) -> QuantizeResult:
    """Quantize a checkpoint, as `halfbyte quantize` does, and write it to `output`.

        halfbyte.quantize("fp8/", "mixed/", "medium-3.5")

    source   directory of the checkpoint
    output   directory to be made; it must not exist, or be empty
    recipe   a recipe of the library by its name, a YAML file, or a Recipe; None takes the one
             that `recipe.fitted` fits to the model's depth
    options  further fields of QuantizeConfig by name: blend, device, memory_bytes, ...

    Raises UsageError, CheckpointError, FormatError or CapacityError; see
    `halfbyte.quantize.pipeline.quantize`, of which this is a shorter form.
    """
    known = {one.name for one in fields(QuantizeConfig)} - {"source", "output", "recipe"}
    if unknown := sorted(set(options) - known):
        raise UsageError(
            f"quantize has no option {unknown[0]!r}; there are {', '.join(sorted(known))}"
        )
    if recipe is None:
        chosen = fitted_recipe(read_config(Path(source))[0]).recipe
    else:
        chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    return run_quantization(QuantizeConfig(Path(source), Path(output), chosen, **options))
