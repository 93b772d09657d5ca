"""Models that Model Optimizer quantized, in the layout of the reference data, for tests of wholes.

The FP8 one is put together from tests/data/golden. The BF16 one is kept beside the repository only
(it takes 16 MB) and joins in where it lies there; of its hardest layer the repository has the
weights, and digests of what the reference made of them.
"""

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

DATA = Path(__file__).parent / "data"
BESIDE = Path(__file__).parents[2] / "shared" / "golden"
MODELS = ("modelopt-tiny-fp8", *(["modelopt-tiny"] if BESIDE.is_dir() else []))


def put_together(name: str, into: Path) -> Path:
    """A folder with source/, export/, calibration, statistics and logits."""
    if name != "modelopt-tiny-fp8":
        return BESIDE / name
    folder = into / name
    kept, configs = DATA / "golden" / name, DATA / "checkpoint" / name
    shutil.copytree(kept, folder)
    shutil.copy(configs / "source-config.json", folder / "source" / "config.json")
    export = folder / "export"
    export.mkdir()
    shutil.copy(configs / "export-config.json", export / "config.json")
    shutil.copy(configs / "hf_quant_config.json", export)
    shutil.copy(folder / "source" / "generation_config.json", export)
    source = load_file(folder / "source" / "model.safetensors")
    tensors = load_file(folder / "export-changed.safetensors")
    tensors |= {key: source[key] for key in json.loads((kept / "export-kept.json").read_text())}
    save_file(tensors, export / "model.safetensors", metadata={"format": "pt"})
    return folder
