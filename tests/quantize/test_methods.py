"""What calibration methods would lose, judged by sampled rows of a weight."""

import pytest
import torch

from halfbyte.quantize.encode import SourceWeight
from halfbyte.quantize.layer import QuantizedLinear
from halfbyte.quantize.methods import JUDGED, output_errors
from halfbyte.quantize.scales import METHODS


@pytest.mark.parametrize("num_rows", [16, 64, 256])
def test_rows_are_taken_from_the_whole_weight(num_rows: int) -> None:
    """Only the later half loses anything: its first rows alone would show no loss."""
    generator = torch.Generator().manual_seed(0)
    stored_OI = torch.randn(num_rows, 64, generator=generator).bfloat16()
    stored_OI[: num_rows // 2] = 0
    x_TI = torch.randn(8, 64, generator=generator).bfloat16()
    source = SourceWeight("a.b", stored_OI, None)
    tensor_scale = stored_OI.float().abs().amax() / (6 * 448)
    linear = QuantizedLinear("a.b", "nvfp4", {"a.b.tensor_scale": tensor_scale}, source)
    seen = x_TI.abs().amax().float()
    errors = output_errors(linear, x_TI, seen, "ieee", METHODS[JUDGED[0]])
    assert errors.keys() == set(JUDGED)
    assert all(db is not None and 10 < db < 40 for db in errors.values())
    assert output_errors(linear, None, seen, "ieee", METHODS[JUDGED[0]]) == {}
