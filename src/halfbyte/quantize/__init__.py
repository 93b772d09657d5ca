"""The post-training quantization pipeline: scales, layers, export, report.

`halfbyte.quantize` is this room and also what programs call to quantize (`quantize.entry`), as a
function of that name could not stand beside a folder of that name. So the room can be called.
"""

import sys
from types import ModuleType
from typing import Any


class _Room(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from halfbyte.quantize.entry import quantize  # when called: it imports torch

        return quantize(*arguments, **options)


sys.modules[__name__].__class__ = _Room
