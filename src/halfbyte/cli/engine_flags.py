"""Flags of the engine: rendered from the fields of `EngineConfig`, read back into one."""

import argparse
import types
from collections.abc import Callable, Collection, Iterator
from dataclasses import fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from halfbyte.engine.options import EngineConfig, options
from halfbyte.errors import UsageError

# Settings of a checkpoint that may be computed with though they are known to ruin a model.
_ACCEPTABLE = ("mscale_all_dim",)


def add_engine_arguments(
    parser: argparse.ArgumentParser, only: Collection[str] | None = None
) -> None:
    """Add the flag of each field of `EngineConfig` that has one, or of those named in `only`."""
    engine = parser.add_argument_group("engine")
    hints = get_type_hints(EngineConfig)
    for one in fields(EngineConfig):
        option = options()[one.name]
        if not option.flag or (only is not None and one.name not in only):
            continue
        if one.name == "accept":
            add_accept(engine)
            continue
        told: dict[str, Any] = {"help": option.help, "dest": one.name}
        if hints[one.name] is bool:
            told["action"] = "store_true"
        else:
            told["default"] = one.default if option.flag_default is None else option.flag_default
            told["metavar"] = option.metavar
            told |= _reading(hints[one.name])
        engine.add_argument(option.flag, *option.also, **told)
    if only is None:
        engine.add_argument("--dtype", default="auto", choices=["auto", "bfloat16"])


def add_accept(parser: argparse._ActionsContainer) -> None:
    """Add `--accept NAME`, which `halfbyte quantize` has as well."""
    option = options()["accept"]
    parser.add_argument(
        option.flag, action="append", default=[], choices=_ACCEPTABLE, help=option.help
    )


def engine_config(args: argparse.Namespace, **fixed: Any) -> EngineConfig:
    """The engine's configuration from the flags of a parser, and from `fixed` values."""
    told = {
        name: getattr(args, name)
        for name, option in options().items()
        if option.flag and hasattr(args, name)
    }
    if "accept" in told:
        told["accept"] = tuple(told["accept"])
    return EngineConfig(**(told | fixed))


def refuse_ours(args: argparse.Namespace) -> None:
    """UsageError for a flag that only our own engine knows, where another one answers."""
    for one in fields(EngineConfig):
        option = options()[one.name]
        untouched = one.default if option.flag_default is None else option.flag_default
        if option.flag and option.is_ours and getattr(args, one.name) != untouched:
            raise UsageError(f"{option.flag} is for our own engine, not for vLLM")


def _reading(hint: Any) -> dict[str, Any]:
    """How argparse reads a value of a type: its choices, or the type itself."""
    kinds = tuple(_kinds(hint))
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    others = [kind for kind in kinds if get_origin(kind) is not Literal]
    if not choices:
        [kind] = others
        return {} if kind is str else {"type": kind}
    if not others:
        return {"choices": sorted(choices, key=lambda choice: choice != "auto")}
    return {"type": _choice_or(choices, others[0])}


def _choice_or(choices: list[str], kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """Reads one of some words, or a value of another kind."""

    def read(text: str) -> Any:
        if text in choices:
            return text
        try:
            return kind(text)
        except ValueError:
            words = " or ".join(choices)
            raise argparse.ArgumentTypeError(f"{text!r} is neither {words} nor a number") from None

    return read


def _kinds(hint: Any) -> Iterator[Any]:
    is_union = get_origin(hint) in (Union, types.UnionType)
    for kind in get_args(hint) if is_union else (hint,):
        if kind is not type(None):
            yield kind
