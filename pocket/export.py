"""`python -m pocket.export`: trained weights -> bf16 and FP8 checkpoints.

The FP8 dialect's static scales come from calibration with held-out text and images of every kind.
"""

import argparse
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from halfbyte.calibrate.observers import AmaxObserver
from halfbyte.calibrate.stream import READERS
from halfbyte.checkpoint.fp8_source import write_fp8_source
from halfbyte.checkpoint.inventory import expected_tensors, shapes_to_write
from halfbyte.checkpoint.metadata import unquantized
from halfbyte.checkpoint.names import foreign_name
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.checkpoint.writer import ShardWriter
from halfbyte.checkpoint.written_metadata import hub_config
from halfbyte.config import ModelConfig
from halfbyte.model.attention import DenseAttend
from halfbyte.model.decoder import Decoder, Step
from halfbyte.model.load import load_decoder, load_vision
from halfbyte.model.vision import VisionModel
from halfbyte.modules import decoder_linears
from halfbyte.pictures import MEAN, STD
from pocket.encode import Encoded, Encoder, Pixels
from pocket.mixture import SHARES, item
from pocket.model import pocket_config
from pocket.train import load_checkpoint
from pocket.vocabulary import Vocabulary

# Calibration items of each kind; their numbers lie beyond those of training and of the tests.
ITEMS_A_KIND, FIRST_NUMBER = 12, 10**9
# What servers do where a request does not say. The skills are measured greedily; at temperature 1,
# the API's default, so small a model wanders off after a few words.
RECOMMENDED_SAMPLING = {"do_sample": False, "temperature": 0.0}
HASHES = "SHA256.json"
IMAGE_ID = 10


def write_bf16(
    weights: Mapping[str, Tensor], config: ModelConfig, tekken: Path, target: Path
) -> None:
    """A bf16 checkpoint in the hub's layout."""
    with ShardWriter(target, shapes_to_write(config, unquantized(config), "hf")) as writer:
        for name, expected in expected_tensors(config, unquantized(config)).items():
            tensor = weights[name].detach().to(torch.bfloat16).cpu().contiguous()
            assert tuple(tensor.shape) == tuple(expected.shape), name
            writer.add(foreign_name(name, "hf", "none"), tensor)
        writer.write_json("config.json", hub_config(config))
        eos = list(config.text.eos_token_ids)
        writer.write_json("generation_config.json", {"eos_token_id": eos, **RECOMMENDED_SAMPLING})
        writer.copy_file(tekken)
        writer.finish()


def rgb_of(image: Pixels) -> Tensor:
    """uint8 pixels (3, height, width) from patches."""
    rows, columns = int(image.rows_P.max()) + 1, int(image.columns_P.max()) + 1
    grid = torch.zeros(rows, columns, 3, 14, 14, dtype=torch.uint8)
    patches = torch.from_numpy(image.patches_PC).view(-1, 3, 14, 14)
    grid[image.rows_P.astype(int), image.columns_P.astype(int)] = patches
    return grid.permute(2, 0, 3, 1, 4).reshape(3, rows * 14, columns * 14)


def pixels_of(image: Pixels) -> Tensor:
    """Normalized pixels (3, height, width) from patches."""
    values = rgb_of(image).float() / 255
    return (values - torch.from_numpy(MEAN)[:, None, None]) / torch.from_numpy(STD)[:, None, None]


def step_of(encoded: Encoded, vision: VisionModel | None) -> tuple[Step, DenseAttend]:
    """One conversation as a step of the engine's decoder."""
    ids = torch.tensor(encoded.ids)
    attend = DenseAttend([0, len(ids)])
    positions = torch.arange(len(ids))
    if not encoded.images:
        return Step(ids, positions, attend), attend
    assert vision is not None
    vectors = torch.cat(vision([pixels_of(image) for image in encoded.images]))
    rows = torch.nonzero(ids == IMAGE_ID).flatten()
    return Step(ids, positions, attend, None, rows, vectors), attend


@torch.inference_mode()
def input_maxima(checkpoint: Checkpoint, conversations: Iterable[Encoded]) -> dict[str, Tensor]:
    """Largest input magnitude of every decoder linear, over text and images."""
    decoder: Decoder = load_decoder(checkpoint)
    vision = load_vision(checkpoint)
    observers = {linear.name: AmaxObserver() for linear in decoder_linears(checkpoint.config)}
    for encoded in conversations:
        step, attend = step_of(encoded, vision)
        x_TD, rotation = decoder.embed(step), decoder.rotary.at(step.positions_T)
        for index, layer in enumerate(decoder.decoder_layers()):

            def tap(point: str, x: Tensor, index: int = index) -> None:
                for short in READERS.get(point, ()):
                    observers[f"decoder.{index}.{short}"].update(x)

            x_TD = layer(x_TD, index, attend, rotation, tap)
    return {name: observer.result() for name, observer in observers.items()}


def calibration_items(encoder: Encoder) -> list[Encoded]:
    """Training-split items that training did not draw, every kind alike."""
    rng = Random(0)
    kinds = [kind for kind in SHARES if kind != "long_recall"]
    numbers = [(k, FIRST_NUMBER + n) for k in kinds for n in range(ITEMS_A_KIND)]
    rng.shuffle(numbers)
    return [encoder.encode(item(kind, number, "train")) for kind, number in numbers]


def sha256(path: Path) -> str:
    """Hash of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def export(
    weights: Mapping[str, Tensor],
    tekken: Path,
    target: Path,
    *,
    config: ModelConfig,
    record: Path | None,
    also_bf16: Path | None = None,
) -> None:
    """Write the FP8 checkpoint, its training record and the hashes of everything."""
    with tempfile.TemporaryDirectory() as scratch:
        plain = Path(scratch) / "bf16"
        write_bf16(weights, config, tekken, plain)
        checkpoint = Checkpoint.open(plain)
        conversations = calibration_items(Encoder(Vocabulary(tekken)))
        write_fp8_source(checkpoint, input_maxima(checkpoint, conversations), target)
        if also_bf16 is not None:
            shutil.copytree(plain, also_bf16)
    if record is not None:
        shutil.copy(record, target / "training.json")
    write_hashes(target)


def write_hashes(directory: Path) -> None:
    """Write SHA256.json: a hash of every other file."""
    files = sorted(path for path in directory.iterdir() if path.is_file() and path.name != HASHES)
    hashes = {path.name: sha256(path) for path in files}
    (directory / HASHES).write_text(json.dumps(hashes, indent=1) + "\n")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m pocket.export", description=__doc__)
    parser.add_argument("trained", type=Path, help="the trainer's checkpoint folder")
    parser.add_argument("target", type=Path, help="the FP8 checkpoint to write")
    parser.add_argument("--tekken", type=Path, required=True)
    parser.add_argument("--bf16", type=Path, help="also keep the bf16 checkpoint here")
    args = parser.parse_args()
    export(
        load_checkpoint(args.trained),
        args.tekken,
        args.target,
        config=pocket_config(),
        record=args.trained / "record.json",
        also_bf16=args.bf16,
    )


if __name__ == "__main__":
    main()
