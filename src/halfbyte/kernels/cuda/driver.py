"""Load machine code and launch kernels through the CUDA driver, by ctypes.

torch owns the context, the memory and the streams. A `Launch` holds its arguments ready, so that a
decode step is a list of them: run once for capture into a graph, or again and again without one.
"""

import ctypes
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from halfbyte.errors import UnsupportedError

_CLUSTER_DIMENSION = 4  # CUlaunchAttributeID
_PROGRAMMATIC_STREAM_SERIALIZATION = 6
_MAX_DYNAMIC_SHARED_SIZE = 8  # CUfunction_attribute


class _Attribute(ctypes.Structure):
    _fields_: ClassVar = [
        ("id", ctypes.c_int),
        ("pad", ctypes.c_int),
        ("value", ctypes.c_uint * 16),
    ]


class _Config(ctypes.Structure):
    _fields_: ClassVar = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    ]


class LinearResult(ctypes.Structure):
    """A linear's result as kernels read it; mirrors `LinearResult` in primitives.cu."""

    _fields_: ClassVar = [
        ("out", ctypes.c_void_p),
        ("partial", ctypes.c_void_p),
        ("row_scale", ctypes.c_void_p),
        ("token_scale", ctypes.c_void_p),
        ("slot_counts", ctypes.c_void_p),
        ("slot_stride", ctypes.c_int64),
        ("stride", ctypes.c_int),
        ("tile_shift", ctypes.c_int),
    ]


Argument = Tensor | int | float | None | LinearResult | ctypes.c_int64


def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise UnsupportedError("there is no CUDA driver on this machine (libcuda.so.1)") from error


def _check(status: int, what: str) -> None:
    if status != 0:
        raise UnsupportedError(f"CUDA driver: {what} failed with status {status}")


class Launch:
    """One kernel with its grid and arguments; the tensors it was given stay alive with it."""

    def __init__(
        self,
        kernel: "Kernel",
        grid: tuple[int, int, int],
        num_threads: int,
        arguments: Sequence[Argument],
        *,
        cluster: int = 1,
        overlaps: bool = True,
    ) -> None:
        self._kernel = kernel
        self._kept = [_to_c(argument) for argument in arguments]
        self._tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        pointers = [ctypes.cast(ctypes.pointer(value), ctypes.c_void_p) for value in self._kept]
        self._pointers = (ctypes.c_void_p * len(pointers))(*pointers)
        attributes = []
        if cluster > 1:
            attributes.append(_attribute(_CLUSTER_DIMENSION, (cluster, 1, 1)))
        if overlaps:
            attributes.append(_attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, (1,)))
        self._attributes = (_Attribute * max(1, len(attributes)))(*attributes)
        self._config = _Config(
            grid=(ctypes.c_uint * 3)(*grid),
            block=(ctypes.c_uint * 3)(num_threads, 1, 1),
            shared_bytes=kernel.shared_bytes,
            stream=None,
            attributes=self._attributes,
            num_attributes=len(attributes),
        )

    def run(self, stream: int) -> None:
        """Enqueue the kernel on `stream` (torch's `Stream.cuda_stream`) and return at once."""
        self._config.stream = stream
        self._kernel.enqueue(self._config, self._pointers)


def _attribute(identity: int, values: tuple[int, ...]) -> _Attribute:
    attribute = _Attribute(id=identity)
    for index, value in enumerate(values):
        attribute.value[index] = value
    return attribute


def _to_c(argument: Argument) -> ctypes.Structure | ctypes._SimpleCData:  # type: ignore[type-arg]
    match argument:
        case Tensor():
            return ctypes.c_void_p(argument.data_ptr())
        case None:
            return ctypes.c_void_p(None)
        case int():
            return ctypes.c_int(argument)
        case float():
            return ctypes.c_float(argument)
        case _:
            return argument


class Module:
    """Loaded machine code; it stays loaded for the life of the process."""

    def __init__(self, code: bytes) -> None:
        torch.cuda.current_stream().synchronize()  # makes sure that torch's context exists
        self._driver = _driver()
        self._module = ctypes.c_void_p()
        _check(self._driver.cuModuleLoadData(ctypes.byref(self._module), code), "load a module")

    def kernel(self, name: str, *, shared_bytes: int = 0) -> "Kernel":
        """A function of the module, allowed `shared_bytes` of dynamic shared memory."""
        function = ctypes.c_void_p()
        status = self._driver.cuModuleGetFunction(
            ctypes.byref(function), self._module, name.encode()
        )
        _check(status, f"find {name}")
        if shared_bytes > 0:
            status = self._driver.cuFuncSetAttribute(
                function, _MAX_DYNAMIC_SHARED_SIZE, shared_bytes
            )
            _check(status, f"give {name} {shared_bytes} bytes of shared memory")
        return Kernel(self._driver, function, name, shared_bytes)


class Kernel:
    """A function of a module with the dynamic shared memory it is launched with."""

    def __init__(
        self, driver: ctypes.CDLL, function: ctypes.c_void_p, name: str, shared_bytes: int
    ) -> None:
        self._driver = driver
        self._function = function
        self.name = name
        self.shared_bytes = shared_bytes

    def enqueue(self, config: _Config, pointers: ctypes.Array[ctypes.c_void_p]) -> None:
        """Launch with a prepared configuration; UnsupportedError if the driver refuses."""
        status = self._driver.cuLaunchKernelEx(ctypes.byref(config), self._function, pointers, None)
        _check(status, f"launch {self.name}")
