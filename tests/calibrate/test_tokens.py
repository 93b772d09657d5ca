"""Calibration rows: what a file may hold, what is refused, what the package carries."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from halfbyte.calibrate.documents import builtin_documents
from halfbyte.calibrate.tokens import check_rows, read_token_rows
from halfbyte.errors import UsageError
from halfbyte.model.tiny import tiny_config


def test_batches_become_rows_in_order(tmp_path: Path) -> None:
    batches = {f"batch{i}.input_ids": torch.full((2, 3 + i), i) for i in (10, 2)}
    save_file(batches, tmp_path / "tokens.safetensors")
    rows = read_token_rows(tmp_path / "tokens.safetensors")
    assert [row.tolist() for row in rows] == [[2] * 5, [2] * 5, [10] * 13, [10] * 13]


def test_padding_is_left_out(tmp_path: Path) -> None:
    batch = {
        "batch0.input_ids": torch.tensor([[0, 0, 5, 6], [0, 0, 0, 0]]),
        "batch0.attention_mask": torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]]),
    }
    save_file(batch, tmp_path / "tokens.safetensors")
    assert [r.tolist() for r in read_token_rows(tmp_path / "tokens.safetensors")] == [[5, 6]]


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({"input_ids": torch.zeros(1, 2, dtype=torch.int64)}, "input_ids: batch0.input_ids"),
        ({"batch0.input_ids": torch.zeros(1, 2)}, "torch.float32"),
        ({"batch0.input_ids": torch.zeros(2, dtype=torch.int64)}, r"\[2\]"),
        ({"batch0.attention_mask": torch.ones(1, 2, dtype=torch.int64)}, "missing"),
        (
            {
                "batch0.input_ids": torch.zeros(1, 2, dtype=torch.int64),
                "batch0.attention_mask": torch.ones(1, 3, dtype=torch.int64),
            },
            "beside",
        ),
    ],
)
def test_other_files_are_refused_by_name(
    tmp_path: Path, tensors: dict[str, torch.Tensor], message: str
) -> None:
    save_file(tensors, tmp_path / "tokens.safetensors")
    with pytest.raises(UsageError, match=message):
        read_token_rows(tmp_path / "tokens.safetensors")


def test_what_is_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"hello")
    for name in ("x", "absent"):
        with pytest.raises(UsageError, match="cannot be read"):
            read_token_rows(tmp_path / name)


@pytest.mark.parametrize(
    "rows, message",
    [
        ((), "no calibration tokens"),
        ((torch.tensor([1]), torch.tensor([512])), "row 1 holds token 512"),
        ((torch.tensor([-1]),), "row 0"),
        ((torch.zeros(5000, dtype=torch.int64),), "5000 tokens"),
    ],
)
def test_rows_that_the_model_cannot_take_are_refused(
    rows: tuple[torch.Tensor, ...], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        check_rows(rows, tiny_config().text, "here")


def test_builtin_text_covers_seven_domains_in_turn() -> None:
    texts = [text for _, text in builtin_documents()]
    assert len(texts) > 40 and 30_000 < sum(map(len, texts)) < 60_000
    assert all(len(text) > 100 for text in texts)
    assert texts[0].startswith("Question: My sourdough")
    assert texts[6].startswith("Frage")
