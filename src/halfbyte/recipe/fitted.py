"""The recipe that is taken where none is named: fitted to a model's depth, and said with reason.

Called by `quantize`, `plan` and `inspect plan`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from halfbyte.config import ModelConfig
from halfbyte.errors import FormatError
from halfbyte.recipe.plan import make_plan
from halfbyte.recipe.schema import Recipe, load_recipe

# The depth that `medium-3.5` was published for (Mistral Medium 3.5, Devstral 2, Mistral Large 2).
PUBLISHED_DEPTH = 88
# Fewer layers have no MLP between the first and the last.
LEAST_MIXED_DEPTH = 3


@dataclass(frozen=True, slots=True)
class Fitted:
    """A recipe of the library, and a sentence for people that says why this one."""

    recipe: Recipe
    reason: str


def fitted_recipe(config: ModelConfig) -> Fitted:
    """The recipe for a model for which nobody has named one.

    The published one where it was published for this depth, `mixed` elsewhere, `fp8` where that
    does not fit: fewer layers than three, or widths that NVFP4 cannot hold.
    """
    layers = config.text.num_layers
    if layers == PUBLISHED_DEPTH:
        return Fitted(load_recipe("medium-3.5"), f"published for {layers} layers")
    if layers < LEAST_MIXED_DEPTH:
        return Fitted(load_recipe("fp8"), f"of {layers} layers none is between first and last")
    mixed = load_recipe("mixed")
    try:
        formats = make_plan(mixed, config).formats
    except FormatError as error:
        return Fitted(load_recipe("fp8"), f"mixed does not fit: {error}")
    fp8 = [n for n in range(layers) if formats[f"decoder.{n}.mlp.gate"] == "fp8"]
    first = "0" if len(fp8) == 2 else f"0-{fp8[-2]}"
    return Fitted(
        mixed,
        f"fitted to {layers} layers: FP8 in attention and in the MLPs of layers {first} and "
        f"{fp8[-1]}, NVFP4 in the other MLPs",
    )


def named_or_fitted(
    name: str | None, config: Callable[[], ModelConfig]
) -> tuple[Recipe, str | None]:
    """The recipe of this name or file, or the fitted one and a sentence that says so.

    config  reads the model's; asked only where no name is given
    """
    if name is not None:
        return load_recipe(name), None
    fitted = fitted_recipe(config())
    chosen = fitted.recipe.name
    return fitted.recipe, f"recipe {chosen}, {fitted.reason}; --recipe takes another"
