"""The last positions of 262,144 through the paged cache, kernels and block tables included."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tolerances
from bounded import relative
from engine_driver import load, prompt_of
from halfbyte.config import RopeConfig
from halfbyte.engine.core import Engine
from halfbyte.engine.plain import PlainDevice
from halfbyte.engine.plan.sequence import Sequence, Work
from halfbyte.engine.request import GenerationRequest, SamplingParams
from halfbyte.kernels import dispatch
from halfbyte.kernels.dispatch import Rotation
from halfbyte.model.decoder import Step
from halfbyte.model.tiny import tiny_config, write_tiny_checkpoint

LONGEST = 262144
NEW = 12


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    directory = tmp_path_factory.mktemp("long") / "bf16"
    tiny = tiny_config(layers=2)
    yarn = RopeConfig(1e6, "yarn", 64.0, 4096, 4.0, 1.0, llama_4_scaling_beta=0.1)
    text = replace(tiny.text, rope=yarn, max_positions=LONGEST)
    write_tiny_checkpoint(directory, config=replace(tiny, text=text))
    return load(directory, max_model_len=LONGEST, kv_cache_tokens=LONGEST, kv_cache="bf16")


class Before:
    """Dense attention behind `length` tokens whose keys and values are `past` in every layer."""

    def __init__(self, past: Tensor) -> None:
        self._past = past

    def __call__(
        self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, rotation: Rotation
    ) -> Tensor:
        q_TNH, k_TKH = dispatch.rotate(q_TNH, k_TKH, rotation)
        keys, values = torch.cat((self._past, k_TKH)), torch.cat((self._past, v_TKH))
        new = q_TNH.shape[0]
        sees = torch.arange(len(keys)) <= len(self._past) + torch.arange(new)[:, None]
        out = F.scaled_dot_product_attention(
            q_TNH.transpose(0, 1)[None].float(),
            keys.transpose(0, 1)[None].float(),
            values.transpose(0, 1)[None].float(),
            attn_mask=sees,
            enable_gqa=True,
        )
        return out[0].transpose(0, 1).to(q_TNH.dtype)


@pytest.mark.parametrize("start", [4096 - NEW // 2, 65536, LONGEST - NEW])
def test_tokens_at_far_positions_equal_dense_attention(engine: Engine, start: int) -> None:
    """As if `start` tokens had been computed: their keys and values are put into the pages."""
    device = engine._runner.device
    assert isinstance(device, PlainDevice)
    cache, decoder = device.cache, device.decoder
    generator = torch.Generator().manual_seed(start)
    heads, size = decoder.config.num_kv_heads, decoder.config.head_dim
    past = (torch.randn(start, heads, size, generator=generator) * 0.5).bfloat16()
    for pages in (page for layer in cache.layers for page in layer):
        pages.view(-1, heads, size)[:start] = past
    ids = prompt_of(NEW, 7)
    request = GenerationRequest("far", (*([3] * start), *ids), SamplingParams(prompt_logprobs=0))
    sequence = Sequence(request, arrival=0, seed=0, max_tokens=1)
    sequence.blocks = list(range(-(-(start + NEW) // cache.block_tokens)))
    found = torch.cat([
        engine._runner.run_alone(Work(sequence, start + first, 4)) for first in range(0, NEW, 4)
    ])  # fmt: skip
    positions = start + torch.arange(NEW)
    expected = decoder(Step(torch.tensor(ids), positions, Before(past)))
    assert found.shape == expected.shape == (NEW, decoder.config.vocab_size)
    assert relative(found, expected) <= tolerances.GOLDEN_BF16
