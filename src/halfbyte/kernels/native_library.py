"""The library of CPU kernels as ctypes sees it: its functions, what they take and give."""

import ctypes
from functools import cache
from typing import Any

from torch import Tensor

from halfbyte.kernels.native_build import library_path
from halfbyte.log import logger

_POINTER, _INT, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong, ctypes.c_float
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "hb_linear": (_INT, *[_POINTER] * 7, *[_INT] * 5),
    "hb_pack": (_INT, *[_POINTER] * 4, *[_INT] * 3),
    "hb_rms_norm": (*[_POINTER] * 5, _INT, _INT, _FLOAT, _INT),
    "hb_round_tokens": (*[_POINTER] * 3, *[_INT] * 3),
    "hb_silu_mul": (_POINTER, _POINTER, _INT, _INT, _INT),
    "hb_rotate": (
        *(_POINTER, _LONG, _INT),
        *(_POINTER, _LONG, _INT),
        *[_POINTER] * 5,
        *[_INT] * 3,
    ),
    "hb_store_kv": (
        *(_POINTER, _LONG, _POINTER, _LONG),
        *[_POINTER] * 3,
        *(_FLOAT, _FLOAT, _INT),
        *[_LONG] * 3,
        *[_INT] * 5,
    ),
    "hb_mask_logits": (_POINTER, _POINTER, _INT),
    "hb_paged_attention": (
        *[_POINTER] * 7,
        *[_LONG] * 4,
        *[_INT] * 6,
        *(_FLOAT, _FLOAT),
        *(_INT, _INT, _POINTER, _INT),
    ),
    "hb_allow_tiles": (_INT,),
    "hb_fp8_to_nvfp4": (*[_POINTER] * 6, _LONG, _INT),
    "hb_largest_code": (_POINTER, _POINTER, _LONG, _INT),
}
_TELLING = ("hb_paged_attention", "hb_allow_tiles")


@cache
def native_library() -> ctypes.CDLL:
    """Compile the library if it is not cached, and load it; UnsupportedError without a compiler."""
    path = library_path()
    library = ctypes.CDLL(str(path))
    for name, signature in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes = signature
        function.restype = ctypes.c_int if name in _TELLING else None
    logger.info("native kernels: %s", path)
    return library


def pointer(tensor: Tensor | None) -> int | None:
    """The address of a tensor's first element as a function of the library takes it; None stays."""
    return None if tensor is None else tensor.data_ptr()
