"""Calibration rows: token ids to run through the model, ragged, without padding.

From a file of recorded ids (the golden data's layout) or drawn from a blend.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from halfbyte.calibrate.blend import load_blend
from halfbyte.calibrate.draw import CalibrationData, RowPictures, draw
from halfbyte.chat.prompt import EncodedImage
from halfbyte.checkpoint.shards import read_header
from halfbyte.config import TextConfig
from halfbyte.errors import CheckpointError, UsageError, in_words

Rows = tuple[Tensor, ...]  # each int64 (tokens,), on the CPU

_BATCH = re.compile(r"batch(\d+)\.(input_ids|attention_mask|picture\d+|place\d+)")


def read_token_rows(path: Path) -> Rows:
    """Rows of text alone, as `read_rows` reads them. Raises UsageError if they show pictures."""
    rows, pictures = read_rows(path)
    if pictures:
        raise UsageError(f"{path}: its rows show pictures; rows of text were expected")
    return rows


def read_rows(path: Path) -> tuple[Rows, RowPictures]:
    """Rows of a safetensors file with `batch{i}.input_ids`, int64 (rows, tokens), in order of i.

    `batch{i}.attention_mask` of the same shape, if there, says which positions are real; padded
    ones are left out, so that they cannot enter the maxima. A batch of one row without a mask may
    show pictures: `batch{i}.picture{k}`, uint8 (3, height, width), and `batch{i}.place{k}`, where
    its tokens begin and how many they are. Raises UsageError naming file and tensor.
    """
    batches: dict[int, dict[str, Tensor]] = {}
    try:
        read_header(path)  # which says in our words what is wrong with it
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - the file is no mapping
                match = _BATCH.fullmatch(name)
                if match is None:
                    raise UsageError(
                        f"{path}: {name[:60]}: batch0.input_ids and so on were expected"
                    )
                batches.setdefault(int(match[1]), {})[match[2]] = file.get_tensor(name)
    except (OSError, SafetensorError, CheckpointError) as error:
        raise UsageError(
            f"{path}: cannot be read as calibration tokens ({in_words(error)})"
        ) from error
    rows: list[Tensor] = []
    pictures: list[tuple[EncodedImage, ...]] = []
    for number in sorted(batches):
        where = f"{path}: batch{number}"
        found = _batch_rows(batches[number], where)
        images = _batch_pictures(batches[number], where)
        rows += found
        pictures += [images] * len(found) if images else [()] * len(found)
    return tuple(rows), tuple(pictures) if any(pictures) else ()


def _batch_pictures(batch: dict[str, Tensor], where: str) -> tuple[EncodedImage, ...]:
    """The pictures of a batch's only row, in order."""
    parts: defaultdict[int, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in batch.items():
        kind = name.rstrip("0123456789")
        if kind in ("picture", "place"):
            parts[int(name.removeprefix(kind))][kind] = tensor
    if parts and (batch["input_ids"].shape[0] != 1 or "attention_mask" in batch):
        raise UsageError(f"{where}: pictures go with a single row and no attention_mask")
    images = []
    for index in sorted(parts):
        pixels, place = parts[index].get("picture"), parts[index].get("place")
        if pixels is None or pixels.dtype != torch.uint8 or pixels.dim() != 3:
            raise UsageError(f"{where}.picture{index}: uint8 [3, height, width] was expected")
        if place is None or place.dtype != torch.int64 or place.shape != (2,):
            raise UsageError(f"{where}.place{index}: int64 [offset, tokens] was expected")
        offset, num_tokens = place.tolist()
        if not 0 <= offset < 2**31 or not 0 < num_tokens < 2**31:
            raise UsageError(f"{where}.place{index}: tokens {offset} and {num_tokens} more")
        images.append(EncodedImage(pixels.numpy(), offset, num_tokens))
    return tuple(images)


def _batch_rows(batch: dict[str, Tensor], where: str) -> list[Tensor]:
    ids = batch.get("input_ids")
    if ids is None or ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
        kind = "missing" if ids is None else f"{ids.dtype} {list(ids.shape)}"
        raise UsageError(f"{where}.input_ids: int64 [rows, tokens] expected, it is {kind}")
    mask = batch.get("attention_mask", torch.ones_like(ids))
    if mask.shape != ids.shape:
        raise UsageError(f"{where}.attention_mask: {list(mask.shape)} beside {list(ids.shape)}")
    rows = [row[keep != 0].to(torch.int64) for row, keep in zip(ids, mask, strict=True)]
    return [row for row in rows if row.numel()]


def builtin_rows(directory: Path, *, samples: int, tokens_per_sample: int) -> Rows:
    """Up to `samples` rows of the text in the package, in the tokens of the checkpoint.

    About 11,000 tokens in all: enough to try things. Raises CheckpointError if the directory has
    no tokenizer.
    """
    blend = load_blend("builtin")
    wanted = replace(blend, samples=samples, tokens_per_sample=tokens_per_sample)
    return as_rows(draw(wanted, directory))


def as_rows(data: CalibrationData) -> Rows:
    """Turn drawn rows into tensors of token ids."""
    return tuple(torch.tensor(row, dtype=torch.int64) for row in data.rows)


def check_rows(rows: Sequence[Tensor], config: TextConfig, where: str) -> None:
    """Raise UsageError for rows that this model cannot run.

    There must be some; ids lie in the vocabulary, and no row is longer than the context.
    """
    if not rows:
        raise UsageError(f"{where}: there are no calibration tokens in it")
    for number, row in enumerate(rows):
        if int(row.min()) < 0 or int(row.max()) >= config.vocab_size:
            raise UsageError(
                f"{where}: row {number} holds token {int(row.max())}; the vocabulary ends at "
                f"{config.vocab_size - 1}. Was it made with another tokenizer?"
            )
        if row.numel() > config.max_positions:
            raise UsageError(
                f"{where}: row {number} has {row.numel()} tokens; the model's context is "
                f"{config.max_positions}"
            )
