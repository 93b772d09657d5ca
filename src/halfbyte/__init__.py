"""halfbyte: quantize, serve and measure Mistral-Medium-class models in mixed NVFP4/FP8.

What programs use is offered here and imported when it is first used, so that `import halfbyte` and
the command line's help stay quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halfbyte.checkpoint.reader import Checkpoint as Checkpoint
    from halfbyte.engine.config import EngineConfig as EngineConfig
    from halfbyte.engine.request import SamplingParams as SamplingParams
    from halfbyte.library import Answer as Answer
    from halfbyte.library import Engine as Engine
    from halfbyte.quantize.entry import quantize as quantize

__version__ = "0.1.0"
__all__ = ["Answer", "Checkpoint", "Engine", "EngineConfig", "SamplingParams", "quantize"]

_HOMES = {
    "Answer": "halfbyte.library",
    "Checkpoint": "halfbyte.checkpoint.reader",
    "Engine": "halfbyte.library",
    "EngineConfig": "halfbyte.engine.config",
    "SamplingParams": "halfbyte.engine.request",
}


def __getattr__(name: str) -> Any:
    if name == "quantize":  # the room, which can be called (see there)
        return importlib.import_module("halfbyte.quantize")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
