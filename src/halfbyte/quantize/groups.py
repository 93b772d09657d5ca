"""Linears that must have one format, the formats that each such group may have, and their bytes.

Called by `sensitivity`, which finds what the formats cost, and by `budget`, which chooses.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from halfbyte.checkpoint.metadata import Quantization
from halfbyte.config import ModelConfig
from halfbyte.modules import (
    LinearSpec,
    WeightFormat,
    fused_partners,
    quantizable_linears,
)
from halfbyte.recipe.plan import linear_size


@dataclass(frozen=True, slots=True)
class Group:
    """Linears that must have one format, with what each format costs them.

    members   canonical names
    losses    format -> what it adds to the KL divergence, nats a token
    sizes     format -> bytes
    """

    members: tuple[str, ...]
    losses: Mapping[WeightFormat, float]
    sizes: Mapping[WeightFormat, int]

    @property
    def name(self) -> str:
        """Name of the group for people, by its members: `decoder.3.attention.q,k,v`."""
        prefix, _, first = self.members[0].rpartition(".")
        shorts = ",".join([first, *(x.rpartition(".")[2] for x in self.members[1:])])
        return f"{prefix}.{shorts}" if prefix else shorts


def groups_of(config: ModelConfig) -> list[tuple[str, ...]]:
    """Linears that must have one format, in model order, an untied head last."""
    names = [linear.name for linear in quantizable_linears(config)]
    return list(dict.fromkeys(fused_partners(name) for name in names))


def unmeasured_groups(config: ModelConfig, source: Quantization) -> list[Group]:
    """The groups with the bytes of their formats, and no loss known."""
    shapes = {linear.name: linear for linear in quantizable_linears(config)}
    return [
        Group(
            members,
            {},
            {
                chosen: sum(linear_size(shapes[name], chosen).num_bytes for name in members)
                for chosen in _choices([shapes[name] for name in members], source)
            },
        )
        for members in groups_of(config)
    ]


def _choices(members: Sequence[LinearSpec], source: Quantization) -> tuple[WeightFormat, ...]:
    """Formats that a group may have: bf16 only where the source is no narrower.

    An FP8 source is FP8 at best: bf16 would take twice the bytes for the same weights.
    """
    is_narrow = any(source.formats.get(x.name, "bf16") != "bf16" for x in members)
    wide: tuple[WeightFormat, ...] = ("fp8",) if is_narrow else ("bf16", "fp8")
    return (*wide, "nvfp4") if members[0].in_features % 16 == 0 else wide
