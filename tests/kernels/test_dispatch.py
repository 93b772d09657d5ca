"""The choice of an implementation, and that every op has its definition."""

import inspect

import pytest
import torch

from halfbyte.errors import UsageError
from halfbyte.kernels import dispatch, reference


def test_every_op_has_a_reference_with_its_signature() -> None:
    for op in dispatch.OPS:
        public = inspect.signature(getattr(dispatch, op))
        twin = inspect.signature(getattr(reference, op))
        assert list(public.parameters) == list(twin.parameters), op


def test_implementations_include_the_definition() -> None:
    for op in dispatch.OPS:
        assert dispatch.implementations(op)["reference"] is getattr(reference, op)
    with pytest.raises(KeyError, match="not one of"):
        dispatch.implementations("softmax")


def test_environment_overrides_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice is made once; here it is asked for without what was remembered."""
    monkeypatch.setattr(dispatch, "_chosen", dispatch._chosen.__wrapped__)
    monkeypatch.setenv("HALFBYTE_KERNELS", "reference")
    assert dispatch.chosen(torch.device("cpu")) == "reference"
    monkeypatch.setenv("HALFBYTE_KERNELS", "fastest")
    with pytest.raises(UsageError, match="HALFBYTE_KERNELS=fastest must be one of"):
        dispatch.chosen(torch.device("cpu"))


def test_prepared_weights_stay_with_their_implementation() -> None:
    """A weight made by one implementation is multiplied by it, whatever is chosen now."""
    w_OI = torch.randn(16, 16).to(torch.bfloat16)
    x_TI = torch.randn(2, 16).to(torch.bfloat16)
    weight = reference.prepare_bf16(w_OI)
    expected = reference.linear_bf16(x_TI, weight)
    assert torch.equal(dispatch.linear_bf16(x_TI, weight), expected)
