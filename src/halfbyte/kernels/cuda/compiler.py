"""CUDA C++ to machine code at run time: NVRTC through ctypes, results cached on disk by content.

Nothing here needs a GPU; `driver.py` loads what comes out. The NVRTC library is the one that comes
with torch's CUDA build. Sources include no headers, so that none need to be found.
"""

import ctypes
import hashlib
import os
import sysconfig
import tempfile
from collections.abc import Mapping
from pathlib import Path

from halfbyte.errors import UnsupportedError

_HERE = Path(__file__).parent
# wgmma and its companions exist for this exact architecture only.
ARCHITECTURE = "sm_90a"
# Set, kernels are compiled such that compute-sanitizer's racecheck can follow them (operands.cu).
RACECHECK_VARIABLE = "HALFBYTE_RACECHECK"
# Files that come in front of another.
_BEFORE = {"linear": ("operands",), "prefill": ("operands",)}


def _library_candidates() -> list[str]:
    folders = {Path(sysconfig.get_paths()[key]) / "nvidia" for key in ("purelib", "platlib")}
    bundled = [
        str(file)
        for folder in sorted(folders)
        for pattern in ("cu13/lib/libnvrtc.so.*", "cuda_nvrtc/lib/libnvrtc.so.*")
        for file in sorted(folder.glob(pattern), reverse=True)
        if "alt" not in file.name
    ]
    return [*bundled, "libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"]


def load_nvrtc() -> ctypes.CDLL:
    """The run-time compiler; UnsupportedError names what was tried."""
    tried = _library_candidates()
    for name in tried:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise UnsupportedError(f"there is no CUDA run-time compiler (NVRTC); tried {', '.join(tried)}")


# Types and trailing immediates of the products whose operands both lie in shared memory.
_SHARED_TYPES = {
    "fp8": ("f32.e4m3.e4m3", "1, 1"),
    "bf16": ("f32.bf16.bf16", "1, 1, 0, 0"),
    "scores": ("f32.f16.f16", "1, 1, 0, 0"),
}
# The same where the left operand, decoded weights or those of attention, lies in registers. Values
# of attention are summed over their rows: the right operand is read transposed.
_REGISTER_TYPES = {
    "nvfp4": ("f32.f16.f16", "1, 1, 0"),
    "nvfp4_fast": ("f32.e4m3.e4m3", "1, 1"),
    "values": ("f32.f16.f16", "1, 1, 1"),
}


def wgmma_source(format_: str, num_columns: int) -> str:
    """The device function that issues one 64 x num_columns product of `format_`.

    `wgmma_ss(sums, weights, tokens, adds)` with both operands in shared memory (fp8, bf16, scores
    of attention), or `wgmma_rs` with the left one in registers (nvfp4 as fp16 or, fast, as e4m3,
    values of attention). `adds` 0 overwrites the sums.
    """
    count = num_columns // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    shape = f"m64n{num_columns}k{32 if format_ in ('fp8', 'nvfp4_fast') else 16}"
    if format_ in _REGISTER_TYPES:
        types, tail = _REGISTER_TYPES[format_]
        left = "{" + ", ".join(f"%{count + i}" for i in range(4)) + "}"
        inputs = ", ".join(f'"r"(a[{i}])' for i in range(4)) + ', "l"(tokens), "r"(adds)'
        signature = f"wgmma_rs(float (&d)[{count}], const u32 (&a)[4], u64 tokens, int adds)"
        next_operand = count + 4
    else:
        types, tail = _SHARED_TYPES[format_]
        left = f"%{count}"
        inputs = '"l"(weights), "l"(tokens), "r"(adds)'
        signature = f"wgmma_ss(float (&d)[{count}], u64 weights, u64 tokens, int adds)"
        next_operand = count + 1
    return f"""
DEVICE void {signature} {{
  asm volatile(
      "{{.reg .pred p; setp.ne.b32 p, %{next_operand + 1}, 0;\\n"
      "wgmma.mma_async.sync.aligned.{shape}.{types} "
      "{{{sums}}}, {left}, %{next_operand}, p, {tail};}}"
      : {outputs}
      : {inputs});
}}
"""


def full_source(name: str, defines: Mapping[str, int], generated: str = "") -> str:
    """The text that is compiled: definitions, primitives, generated functions, the file `name`."""
    lines = "".join(f"#define {key} {value}\n" for key, value in sorted(defines.items()))
    names = [*_BEFORE.get(name, ()), name]
    files = [(_HERE / f"{file}.cu").read_text(encoding="utf-8") for file in ("primitives", *names)]
    return lines + files[0] + generated + "".join(files[1:])


def compile_source(source: str, options: tuple[str, ...], nvrtc: ctypes.CDLL) -> bytes:
    """Machine code of `source`; raises UnsupportedError with the compiler's log."""
    program = ctypes.c_void_p()
    text = source.encode()
    _check(
        nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, b"halfbyte.cu", 0, None, None),
        "create",
    )
    arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    status = nvrtc.nvrtcCompileProgram(program, len(options), arguments)
    if status != 0:
        size = ctypes.c_size_t()
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        raise UnsupportedError(f"a CUDA kernel does not compile:\n{log.value.decode()}")
    size = ctypes.c_size_t()
    _check(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)), "size")
    code = ctypes.create_string_buffer(size.value)
    _check(nvrtc.nvrtcGetCUBIN(program, code), "code")
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return code.raw


def _check(status: int, what: str) -> None:
    if status != 0:
        raise UnsupportedError(f"CUDA run-time compiler: {what} failed with status {status}")


def cache_directory() -> Path:
    """The folder where compiled kernels are kept between runs."""
    base = os.environ.get("XDG_CACHE_HOME", "") or str(Path.home() / ".cache")
    return Path(base) / "halfbyte" / "kernels"


def compile_kernel(
    name: str,
    defines: Mapping[str, int],
    *,
    generated: str = "",
    directory: Path | None = None,
) -> bytes:
    """Machine code of `name`.cu under `defines`, from the cache if it was made before."""
    options = [f"--gpu-architecture={ARCHITECTURE}", "--std=c++17"]
    if os.environ.get(RACECHECK_VARIABLE):
        defines = {**defines, "EVERY_LANE_RELEASES": 1}
    source = full_source(name, defines, generated)
    nvrtc = load_nvrtc()
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    identity = "\n".join((f"{major.value}.{minor.value}", *options, source))
    folder = cache_directory() if directory is None else directory
    file = folder / f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:24]}.cubin"
    if file.exists():
        return file.read_bytes()
    code = compile_source(source, tuple(options), nvrtc)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as temporary:
        temporary.write(code)
    Path(temporary.name).replace(file)
    return code
