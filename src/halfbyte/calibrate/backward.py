"""One decoder layer run so that gradients flow through it, a row at a time, and the head likewise.

The kernels compute no gradients; these are the same steps in plain torch, with weights that want
none. Rounding differs from the forward pass in last bits. Called by `quantize.sensitivity`.

Shapes: T tokens of one row, D model width, I and O features of a linear, V vocabulary.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from halfbyte.calibrate.stream import READERS
from halfbyte.config import TextConfig
from halfbyte.kernels import reference
from halfbyte.model.rope import Rotation


class Passed(NamedTuple):
    """What one row of tokens showed on its way through one layer and back.

    inputs     tap point -> what its linears read, bf16 (T, I)
    outputs    short name (`attention.q`) -> what the linear gave, bf16 (T, O)
    gradients  short name -> of the log-probs drawn, with respect to that output
    before_TD  gradient with respect to the layer's input
    """

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    before_TD: Tensor


def run_backward(
    config: TextConfig,
    weights: Mapping[str, Tensor],
    x_TD: Tensor,
    after_TD: Tensor,
    rotation: Rotation,
) -> Passed:
    """Run one row through one layer, and a gradient of its output back to its input.

    weights   short name of each linear -> bf16 (O, I), and both norms by name
    after_TD  gradient with respect to the layer's output
    """
    outputs: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    tap_of = {short: tap for tap, readers in READERS.items() for short in readers}

    def linear(short: str, read_TI: Tensor) -> Tensor:
        inputs.setdefault(tap_of[short], read_TI.detach())
        y_TO = F.linear(read_TI, weights[short])
        y_TO.retain_grad()
        outputs[short] = y_TO
        return y_TO

    with torch.enable_grad():
        x_TD = x_TD.detach().requires_grad_()
        normed_TD = reference.rms_norm(x_TD, weights["attention_norm"], config.norm_eps)
        q_TNH, k_TKH, v_TKH = (
            linear(f"attention.{short}", normed_TD).view(x_TD.shape[0], -1, config.head_dim)
            for short in ("q", "k", "v")
        )
        q_TNH, k_TKH = reference.rotate(q_TNH, k_TKH, rotation)
        out_NTH = F.scaled_dot_product_attention(
            q_TNH.transpose(0, 1)[None],
            k_TKH.transpose(0, 1)[None],
            v_TKH.transpose(0, 1)[None],
            is_causal=True,
            enable_gqa=True,
        )[0]
        out_TD = out_NTH.transpose(0, 1).flatten(1)
        middle_TD = x_TD + linear("attention.o", out_TD)
        normed_TD = reference.rms_norm(middle_TD, weights["mlp_norm"], config.norm_eps)
        gate_up_T2F = torch.cat(
            [linear("mlp.gate", normed_TD), linear("mlp.up", normed_TD)], dim=-1
        )
        result_TD = middle_TD + linear("mlp.down", reference.silu_mul(gate_up_T2F))
        result_TD.backward(after_TD.to(result_TD.dtype))  # type: ignore[no-untyped-call]
    gradients = {short: _gradient(y_TO) for short, y_TO in outputs.items()}
    return Passed(
        inputs,
        {short: y_TO.detach() for short, y_TO in outputs.items()},
        gradients,
        _gradient(x_TD),
    )


def _gradient(x: Tensor) -> Tensor:
    assert x.grad is not None, "nothing flowed back"
    return x.grad


class HeadPassed(NamedTuple):
    """What one row showed behind the last layer.

    hidden_TD   what the head reads
    logits_TV   f32
    before_TD   gradient of the drawn tokens' log-probs with respect to the last layer's output
    """

    hidden_TD: Tensor
    logits_TV: Tensor
    before_TD: Tensor


def run_head_backward(
    config: TextConfig,
    norm_D: Tensor,
    head_VD: Tensor,
    x_TD: Tensor,
    generator: torch.Generator,
) -> HeadPassed:
    """Draw a token at every position from the model's own distribution and go back from there.

    The expected square of such a gradient is the Fisher information: how fast the distribution
    moves away from itself, measured as a KL divergence, as `x_TD` moves.
    """
    with torch.enable_grad():
        x_TD = x_TD.detach().requires_grad_()
        hidden_TD = reference.rms_norm(x_TD, norm_D, config.norm_eps)
        logits_TV = F.linear(hidden_TD, head_VD).float()
        with torch.no_grad():
            probabilities_TV = torch.softmax(logits_TV, dim=-1)
            drawn_T1 = torch.multinomial(probabilities_TV.cpu(), 1, generator=generator)
            # Of log p(drawn) with respect to the logits.
            toward_TV = -probabilities_TV
            toward_TV.scatter_add_(1, drawn_T1.to(x_TD.device), torch.ones_like(toward_TV[:, :1]))
        logits_TV.backward(toward_TV)  # type: ignore[no-untyped-call]
    return HeadPassed(hidden_TD.detach(), logits_TV.detach(), _gradient(x_TD))
