"""What of the CUDA decoder's prefill runs anywhere: attention of a chunk over what is stored."""

import pytest
import torch

from bounded import relative
from halfbyte.kernels import reference
from halfbyte.model.cuda.launches import SharedBuffers
from halfbyte.model.cuda.prefill import attend_to_end


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (5, 5), (1, 9), (4, 37), (36, 37)])
def test_a_chunk_attends_to_everything_before_and_nothing_after(queries: int, keys: int) -> None:
    generator = torch.Generator().manual_seed(keys)
    q = torch.randn(queries, 6, 64, generator=generator).bfloat16()
    k, v = (torch.randn(keys, 2, 64, generator=generator).bfloat16() for _ in range(2))
    pages = -(-keys // 4)
    cache = []
    for dense in (k, v):
        paged = torch.full((pages, 4, 2, 64), torch.nan, dtype=torch.bfloat16)
        paged.view(-1, 2, 64)[:keys] = dense
        cache.append(paged)
    wanted = reference.paged_attention(
        q,
        cache[0].nan_to_num(),
        cache[1].nan_to_num(),
        1.0,
        1.0,
        torch.arange(pages, dtype=torch.int32)[None],
        torch.tensor([keys], dtype=torch.int32),
        torch.tensor([0, queries], dtype=torch.int32),
        0.11,
    )
    found = attend_to_end(q, k, v, 0.11)
    assert found.shape == wanted.shape
    assert relative(found, wanted) < 2.0**-7  # two roundings to bf16


def test_shared_buffers_serve_smaller_steps_from_the_same_memory() -> None:
    shared = SharedBuffers()
    cpu = torch.device("cpu")
    large = shared.take("partial", 100, torch.float32, cpu)
    small = shared.take("partial", 40, torch.float32, cpu)
    assert small.data_ptr() == large.data_ptr() and small.numel() == 40
    assert shared.take("out", 8, torch.bfloat16, cpu).data_ptr() != large.data_ptr()
    assert shared.num_bytes == 416
    larger = shared.take("partial", 200, torch.float32, cpu)
    assert larger.numel() == 200 and not larger.any()
