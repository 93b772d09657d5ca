"""Cut the golden data of the reference folder down to what the repository carries.

MODEL.safetensors       for tests of the formats: the first 24 rows of a few weights (all deliberate
                        corner cases lie there), with the statistics, scales and codes that belong
                        to them. Rows are independent given the tensor scale
modelopt-tiny-fp8/      for tests of whole models: the source, what the reference's export has that
                        the source has not, its statistics, and logits of one sequence of text
                        and one picture. `tests/golden_models.py` puts the export together again
modelopt-tiny/          for tests of a BF16 source: the weights of layer 4 that have every corner
                        case, all statistics, and digests of what the reference made of them

Configs are those of tests/data/checkpoint.
Run: python tests/data/golden/make_subset.py GOLDEN
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
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

    whole_model(golden / "modelopt-tiny-fp8", here / "modelopt-tiny-fp8")
    one_layer(golden / "modelopt-tiny", here / "modelopt-tiny")


def all_of(directory: Path) -> dict[str, Tensor]:
    return {k: v for path in directory.glob("*.safetensors") for k, v in load_file(path).items()}


def same(a: Tensor | None, b: Tensor) -> bool:
    if a is None or a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def whole_model(model: Path, out: Path) -> None:
    """What tests of a whole model ask for; of the export only what is not the source's."""
    (out / "source").mkdir(parents=True, exist_ok=True)
    for name in ("calibration.safetensors", "amax-before-export.safetensors", "versions.json"):
        shutil.copy(model / name, out)
    for path in (model / "source").iterdir():
        if path.name != "config.json":
            shutil.copy(path, out / "source")
    source, export = all_of(model / "source"), all_of(model / "export")
    changed = {name: t for name, t in export.items() if not same(source.get(name), t)}
    save_file(changed, out / "export-changed.safetensors")
    (out / "export-kept.json").write_text(
        json.dumps(sorted(export.keys() - changed.keys()), indent=0) + "\n"
    )
    golden = load_file(model / "golden-forward.safetensors")
    kept = {
        name: tensor[:1].contiguous()
        for name, tensor in golden.items()
        if not name.startswith("logits.fakequant_bf16")
        and name not in ("logits.source_bf16.image", "logits.fakequant_fused_bf16.image")
    }
    save_file(kept, out / "golden-forward.safetensors")


LAYER = "model.language_model.layers.4."
LINEARS = ("self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def one_layer(model: Path, out: Path) -> None:
    out.mkdir(exist_ok=True)
    shutil.copy(model / "amax-before-export.safetensors", out)
    wanted = tuple(f"{LAYER}{name}." for name in LINEARS)
    source = {k: v for k, v in all_of(model / "source").items() if k.startswith(wanted)}
    save_file(source, out / "source-layer-4.safetensors")
    digests = {}
    for profile, made in (
        ("ieee", all_of(model / "export")),
        ("cuda", load_file(model / "export-cuda-subset.safetensors")),
    ):
        digests[profile] = {
            name: [str(t.dtype), list(t.shape), digest(t)]
            for name, t in sorted(made.items())
            if name.startswith(wanted)
        }
    (out / "export-layer-4.json").write_text(json.dumps(digests, indent=1) + "\n")


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
