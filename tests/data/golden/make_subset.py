"""Cut the golden data of ../shared down to what the repository carries.

Keeps the first 24 rows of a few weights (all deliberate corner cases lie there), with the
statistics, scales and codes that belong to them. Rows are independent given the tensor scale.
Run: python tests/data/golden/make_subset.py ../shared/golden
"""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

ROWS = 24
MODULES = {
    "modelopt-tiny": (
        "layers.0.self_attn.q_proj",
        "layers.0.self_attn.k_proj",
        "layers.0.mlp.down_proj",
        "layers.4.mlp.gate_proj",
        "layers.4.mlp.up_proj",
        "layers.4.mlp.down_proj",
    ),
    "modelopt-tiny-fp8": (
        "layers.3.self_attn.o_proj",
        "layers.4.mlp.up_proj",
        "layers.4.mlp.down_proj",
    ),
}


def tensors_of(paths: Iterable[Path], wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """Tensors of the files whose name satisfies `wanted`, cut to ROWS rows."""
    found = {}
    for path in sorted(paths):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if wanted(name):
                    tensor = file.get_tensor(name)
                    found[name] = (tensor[:ROWS] if tensor.dim() else tensor).contiguous()
    return found


def main(golden: Path) -> None:
    here = Path(__file__).parent
    for model, modules in MODULES.items():
        source = golden / model

        def belongs(name: str, modules: tuple[str, ...] = modules) -> bool:
            return any(f".{module}." in name for module in modules)

        subset = {}
        for kind, paths in (
            ("source", source.glob("source/*.safetensors")),
            ("ieee", source.glob("export/*.safetensors")),
            ("cuda", source.glob("export-cuda-subset.safetensors")),
        ):
            for name, tensor in tensors_of(paths, belongs).items():
                subset[f"{kind}:{name}"] = tensor
        for name, tensor in tensors_of(
            [source / "amax-after-export.safetensors"], lambda name: True
        ).items():
            subset[f"amax:{name}"] = tensor
        for name, tensor in tensors_of(
            source.glob("export*/*.safetensors"),
            lambda name: name.endswith((".input_scale", ".k_scale", ".v_scale")),
        ).items():
            subset[f"ieee:{name}"] = tensor
        for name, tensor in tensors_of(
            source.glob("export-cuda-subset.safetensors"),
            lambda name: name.endswith((".input_scale", ".k_scale", ".v_scale")),
        ).items():
            subset[f"cuda:{name}"] = tensor
        save_file(subset, here / f"{model}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
