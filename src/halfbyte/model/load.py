"""Checkpoint -> modules, layer by layer, every tensor accounted for.

The reader knows files and dialects; here the canonical tensors of a linear become what
`model.linear` takes, on the device where they run. A tensor-parallel rank reads its slices only.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch

from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.config import TextConfig, VisionConfig
from halfbyte.errors import CheckpointError
from halfbyte.formats.fp8 import decode_fp8
from halfbyte.formats.nvfp4 import EncodedNVFP4, decode_nvfp4
from halfbyte.kernels import dispatch
from halfbyte.model.decoder import Decoder, DecoderLayer
from halfbyte.model.eagle import EagleHead
from halfbyte.model.linear import FusedLinear, Linear, Mode, StoredLinear, is_per_token, make_linear
from halfbyte.model.parallel import Communicator, Shard, Solo, SummedLinear, shard_of, slice_of
from halfbyte.model.saturation import CountedLinear, SaturationCounts
from halfbyte.model.vision import (
    EncoderLayer,
    EncoderLayerWeights,
    ProjectorWeights,
    VisionModel,
    num_layers_used,
)
from halfbyte.modules import Fp8Activations

# Told how many bytes of host memory are about to be taken; may raise to have the load end there.
BeforeTaking = Callable[[int], object]

_ATTENTION = ("q", "k", "v")
_GATED = ("gate", "up")


class _Source:
    """A checkpoint that remembers which tensors were taken. Lives for one load."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        mode: Mode,
        dtype: torch.dtype,
        shard: Shard | None = None,
        before: BeforeTaking | None = None,
        fp8_activations: Fp8Activations = "auto",
        saturation: SaturationCounts | None = None,
    ) -> None:
        self._before = before
        self._saturation = saturation
        self._fp8_activations: Fp8Activations = fp8_activations
        self._shard = shard or shard_of(checkpoint.config.text, 0, 1)
        self._checkpoint = checkpoint
        self._names = frozenset(checkpoint.names())
        self._taken: set[str] = set()
        self.device = device
        self.mode = mode
        self.dtype = dtype

    def tensor(self, name: str) -> torch.Tensor:
        self._taken.add(name)
        if self._before is not None:
            self._before(self._checkpoint.num_bytes(name))
        return self._checkpoint.tensor(name).to(self.device)

    def dense(self, name: str) -> torch.Tensor:
        """Read an unquantized tensor in the dtype that is computed in."""
        return self.tensor(name).to(self.dtype)

    def scalar(self, name: str) -> float:
        self._taken.add(name)
        return self._checkpoint.scale(name)

    def linear(self, group: str, shorts: Iterable[str] = ()) -> Linear:
        """One linear, or the members of a fused group as one: `("decoder.3.mlp", ("gate", "up"))`.

        In f32 (used to check against other implementations) weights are decoded first.
        """
        names = [f"{group}.{short}" for short in shorts] or [group]
        if self.dtype == torch.float32:
            return self.decoded(names)
        return self.made([self.stored(name) for name in names], "_".join(shorts))

    def made(self, group: Sequence[StoredLinear], kind: str = "") -> Linear:
        """The linear of stored ones that read one input; `kind` is what it is counted as."""
        linear = make_linear(group, self.mode, self._fp8_activations)
        if self._saturation is None or group[0].format != "fp8":
            return linear
        scales = [member.input_scale for member in group]
        if is_per_token(scales, self._fp8_activations):
            return linear
        largest = max(scale for scale in scales if scale is not None)
        kind = {"": "head", "q_k_v": "qkv"}.get(kind, kind)
        return CountedLinear(linear, self._saturation, kind, largest)

    def decoded(self, names: Iterable[str]) -> FusedLinear:
        """A group with its weights decoded to bf16, widened to the compute dtype."""
        group = [self.stored(name) for name in names]
        rows = [linear.weight.shape[0] for linear in group]
        if len(group) == 1:
            self._will_make(group, rows[0])
            return FusedLinear(
                dispatch.prepare_bf16(_decode(group[0]).to(self.dtype)), "bf16", None
            )
        fused_OI: torch.Tensor | None = None
        for number, part in enumerate(rows):
            # One decoded member at a time beside the group: a group of the 128B model has 1.4 GB.
            self._will_make(group, part if number else part + sum(rows))
            weight_OI = _decode(group[number])
            if fused_OI is None:
                fused_OI = weight_OI.new_empty((sum(rows), weight_OI.shape[1]), dtype=self.dtype)
            start = sum(rows[:number])
            fused_OI[start : start + part] = weight_OI
        assert fused_OI is not None, "an empty group"
        # The kernels lay out a copy.
        self._will_make(group, sum(rows))
        return FusedLinear(dispatch.prepare_bf16(fused_OI), "bf16", None)

    def _will_make(self, group: list[StoredLinear], num_rows: int) -> None:
        """Announce the bytes of decoded rows that are about to be made of a group."""
        if self._before is not None and self.device.type == "cpu":
            weight = group[0].weight
            width = weight.shape[1] * (2 if group[0].format == "nvfp4" else 1)
            self._before(num_rows * width * self.dtype.itemsize)

    def rows(self, name: str, rows: range) -> torch.Tensor:
        """Rows of an unquantized tensor in the compute dtype."""
        if len(rows) == self._checkpoint.shape(name)[0]:
            return self.dense(name)
        self._taken.add(name)
        part = self._checkpoint.rows(name, rows.start, rows.stop)
        return part.to(self.device).to(self.dtype)

    def whole(self, name: str) -> StoredLinear:
        """A linear of no decoder layer, bf16 or FP8, as stored."""
        return self._with_scales(name, self.tensor(f"{name}.weight"))

    def head(self, embedding_VD: torch.Tensor) -> Linear:
        """The rank's rows of the head; those of its embedding if the two are one."""
        if self._checkpoint.config.text.tied_head:
            return self.made([StoredLinear("head", "bf16", embedding_VD)])
        return self.linear("head")

    def stored(self, name: str) -> StoredLinear:
        """A decoder linear or the head as stored, or the rank's part of it."""
        return self._with_scales(name, self._part(name, "weight"))

    def _with_scales(self, name: str, weight: torch.Tensor) -> StoredLinear:
        format = self._checkpoint.format_of(name)
        if format == "bf16":
            return StoredLinear(name, format, weight.to(self.dtype))
        has_input_scale = f"{name}.input_scale" in self._names
        input_scale = self.scalar(f"{name}.input_scale") if has_input_scale else None
        if format == "fp8":
            return StoredLinear(name, format, weight, self._fp8_scale(name), None, input_scale)
        return StoredLinear(
            name,
            format,
            weight,
            self._part(name, "weight_scale"),
            self._scalar_tensor(f"{name}.tensor_scale"),
            input_scale,
        )

    def _part(self, name: str, role: Literal["weight", "weight_scale"]) -> torch.Tensor:
        checkpoint, tensor = self._checkpoint, f"{name}.{role}"
        head_dim = checkpoint.config.text.head_dim
        axis, part = slice_of(self._shard, head_dim, name, role, checkpoint.format_of(name))
        if len(part) == checkpoint.shape(tensor)[axis]:
            return self.tensor(tensor)
        self._taken.add(tensor)
        read = checkpoint.rows if axis == 0 else checkpoint.columns
        return read(tensor, part.start, part.stop).to(self.device)

    def _fp8_scale(self, name: str) -> torch.Tensor:
        """The scale of an FP8 weight, 0-d, or those of its rows, (O, 1): f32."""
        tensor = f"{name}.weight_scale"
        if not self._checkpoint.shape(tensor):
            return self._scalar_tensor(tensor)
        self._taken.add(tensor)
        head_dim = self._checkpoint.config.text.head_dim
        axis, part = slice_of(self._shard, head_dim, name, "weight_scale", "fp8")
        rows = (part.start, part.stop) if axis == 0 else (0, None)
        return self._checkpoint.row_scales(name, *rows).to(self.device)

    def _scalar_tensor(self, name: str) -> torch.Tensor:
        return torch.tensor(self.scalar(name), dtype=torch.float32, device=self.device)

    def kv_scales(self, layer: int) -> tuple[float, float]:
        prefix = f"decoder.{layer}.attention"
        if f"{prefix}.k_scale" not in self._names:
            return 1.0, 1.0
        return self.scalar(f"{prefix}.k_scale"), self.scalar(f"{prefix}.v_scale")

    def check_all_taken(self, part: Literal["text", "vision"]) -> None:
        """Raise CheckpointError naming tensors of this part that nothing reads."""
        left = sorted(
            name
            for name in self._names - self._taken
            if name.startswith(("encoder.", "projector.")) == (part == "vision")
        )
        if left:
            raise CheckpointError(f"{len(left)} tensors are not used by the model: {left[:3]}")

    def skip(self, prefix: str) -> None:
        """Count tensors as accounted for without reading them."""
        self._taken.update(name for name in self._names if name.startswith(prefix))

    def optional(self, name: str) -> torch.Tensor | None:
        return self.dense(name) if name in self._names else None

    def stacked(self, group: str, shorts: Iterable[str]) -> torch.Tensor:
        """The unquantized weights of linears that read one input, one below the other."""
        return torch.cat([self.dense(f"{group}.{short}.weight") for short in shorts])


def load_decoder(
    checkpoint: Checkpoint,
    *,
    device: torch.device | str = "cpu",
    mode: Mode = "weight_only",
    dtype: torch.dtype = torch.bfloat16,
    communicator: Communicator | None = None,
    fp8_activations: Fp8Activations = "auto",
    saturation: SaturationCounts | None = None,
) -> Decoder:
    """Build the text model of a checkpoint on `device`, or a tensor-parallel rank's part of it.

    mode   decision 0004; "declared" needs an input scale for every NVFP4 linear
    dtype  what activations are computed in: bf16, or f32 (weight_only, decoded weights) to check
           against other implementations
    fp8_activations  by what FP8 linears round theirs, where the mode has them do so
    saturation       counts of what the checkpoint's input scales clip; in weight_only, would clip
    Raises CheckpointError for a missing tensor and for one that nothing reads, UsageError if the
    ranks cannot share the heads. The vision part is not read here (`load_vision`).
    """
    assert dtype == torch.bfloat16 or mode == "weight_only", "declared computes in bf16"
    communicator = communicator or Solo()
    text = checkpoint.config.text
    shard = shard_of(text, communicator.rank, communicator.size)
    source = _Source(
        checkpoint,
        torch.device(device),
        mode,
        dtype,
        shard,
        fp8_activations=fp8_activations,
        saturation=saturation,
    )
    embedding_VD = source.rows("embedding.weight", shard.vocab)
    layers = [_layer(source, shard.local(text), layer, communicator) for layer in _layers(text)]
    decoder = Decoder(
        shard.local(text),
        embedding_VD=embedding_VD,
        layers=layers,
        norm_D=source.dense("norm.weight"),
        head=source.head(embedding_VD),
        kv_scales=[source.kv_scales(layer) for layer in _layers(text)],
        communicator=communicator,
        saturation=saturation,
    )
    source.check_all_taken("text")
    return decoder


def load_layer(
    checkpoint: Checkpoint,
    layer: int,
    *,
    device: torch.device | str = "cpu",
    before: BeforeTaking | None = None,
) -> DecoderLayer:
    """Load one decoder layer with its weights decoded to bf16, whatever the dialect.

    before  told of every large piece of host memory before it is taken, in bytes; what it raises
            ends the load
    """
    place = torch.device(device)
    source = _Source(checkpoint, place, "weight_only", torch.bfloat16, before=before)
    prefix = f"decoder.{layer}"
    attention, mlp = f"{prefix}.attention", f"{prefix}.mlp"
    return DecoderLayer(
        checkpoint.config.text,
        source.dense(f"{prefix}.attention_norm.weight"),
        source.dense(f"{prefix}.mlp_norm.weight"),
        qkv=source.decoded([f"{attention}.{short}" for short in _ATTENTION]),
        o=source.decoded([f"{attention}.o"]),
        gate_up=source.decoded([f"{mlp}.{short}" for short in _GATED]),
        down=source.decoded([f"{mlp}.down"]),
    )


def check_draft(checkpoint: Checkpoint, target: TextConfig) -> None:
    """Raise CheckpointError if a draft model is not made for a target of this config."""
    text = checkpoint.config.text
    for field, ours, theirs in (
        ("width", text.width, target.width),
        ("vocab_size", text.vocab_size, target.vocab_size),
    ):
        if ours != theirs:
            raise CheckpointError(
                f"{checkpoint.directory}: {field} {ours} does not fit the model's {theirs}; an "
                "EAGLE head serves only the model it was trained for"
            )


def load_eagle(
    checkpoint: Checkpoint,
    target: TextConfig,
    *,
    device: torch.device | str = "cpu",
    mode: Mode = "weight_only",
    fp8_activations: Fp8Activations = "auto",
) -> EagleHead:
    """Build a draft model (`Checkpoint.open_eagle`) for a target of config `target`.

    Raises CheckpointError if the two do not fit together.
    """
    text = checkpoint.config.text
    check_draft(checkpoint, target)
    source = _Source(
        checkpoint, torch.device(device), mode, torch.bfloat16, fp8_activations=fp8_activations
    )
    head = EagleHead(
        text,
        fuse=source.made([source.whole("eagle.fuse")]),
        layers=[_layer(source, text, layer, Solo()) for layer in _layers(text)],
        norm_D=source.dense("norm.weight"),
    )
    source.check_all_taken("text")
    return head


def load_vision(
    checkpoint: Checkpoint,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> VisionModel | None:
    """Build the vision part of a checkpoint on `device`; None for a text-only model.

    Encoder layers behind the feature layer are not read. Raises CheckpointError as `load_decoder`.
    """
    config = checkpoint.config.vision
    if config is None:
        return None
    source = _Source(checkpoint, torch.device(device), "weight_only", dtype)
    used = num_layers_used(config)
    for layer in range(used, config.num_layers):
        source.skip(f"encoder.{layer}.")
    layers = [_encoder_layer(source, layer) for layer in range(used)]
    vision = _vision(source, checkpoint.config.text, config, layers)
    source.check_all_taken("vision")
    return vision


def load_vision_ends(
    checkpoint: Checkpoint,
    *,
    device: torch.device | str = "cpu",
    before: BeforeTaking | None = None,
) -> VisionModel:
    """Load what lies before and behind the encoder's layers, for callers that run these one by one.

    before  as for `load_layer`
    The checkpoint must have a vision part.
    """
    config = checkpoint.config.vision
    assert config is not None, "a text-only model"
    source = _Source(checkpoint, torch.device(device), "weight_only", torch.bfloat16, before=before)
    return _vision(source, checkpoint.config.text, config, ())


def load_vision_layer(
    checkpoint: Checkpoint,
    layer: int,
    *,
    device: torch.device | str = "cpu",
    before: BeforeTaking | None = None,
) -> EncoderLayer:
    """Load one layer of the vision encoder; see `load_vision_ends`."""
    config = checkpoint.config.vision
    assert config is not None, "a text-only model"
    source = _Source(checkpoint, torch.device(device), "weight_only", torch.bfloat16, before=before)
    return EncoderLayer(config, _encoder_layer(source, layer))


def _vision(
    source: _Source,
    text: TextConfig,
    config: VisionConfig,
    layers: Sequence[EncoderLayerWeights],
) -> VisionModel:
    return VisionModel(
        config,
        patch=source.dense("encoder.patch.weight"),
        norm_D=source.dense("encoder.norm.weight"),
        layers=layers,
        projector=ProjectorWeights(
            norm_D=source.optional("projector.norm.weight"),
            merge=source.optional("projector.merge.weight"),
            into=source.dense("projector.in.weight"),
            into_bias=source.optional("projector.in.bias"),
            out=source.dense("projector.out.weight"),
            out_bias=source.optional("projector.out.bias"),
        ),
        projector_eps=text.norm_eps,
    )


def _encoder_layer(source: _Source, layer: int) -> EncoderLayerWeights:
    prefix = f"encoder.{layer}"
    return EncoderLayerWeights(
        attention_norm_D=source.dense(f"{prefix}.attention_norm.weight"),
        qkv=source.stacked(f"{prefix}.attention", _ATTENTION),
        o=source.dense(f"{prefix}.attention.o.weight"),
        mlp_norm_D=source.dense(f"{prefix}.mlp_norm.weight"),
        gate_up=source.stacked(f"{prefix}.mlp", _GATED),
        down=source.dense(f"{prefix}.mlp.down.weight"),
    )


def _layers(text: TextConfig) -> range:
    return range(text.num_layers)


def _layer(
    source: _Source, local: TextConfig, layer: int, communicator: Communicator
) -> DecoderLayer:
    prefix = f"decoder.{layer}"
    o = source.linear(f"{prefix}.attention", ("o",))
    down = source.linear(f"{prefix}.mlp", ("down",))
    if communicator.size > 1:
        o, down = SummedLinear(o, communicator), SummedLinear(down, communicator)
    return DecoderLayer(
        local,
        source.dense(f"{prefix}.attention_norm.weight"),
        source.dense(f"{prefix}.mlp_norm.weight"),
        qkv=source.linear(f"{prefix}.attention", _ATTENTION),
        o=o,
        gate_up=source.linear(f"{prefix}.mlp", _GATED),
        down=down,
    )


def _decode(linear: StoredLinear) -> torch.Tensor:
    """The weight as numbers in bf16; see `Checkpoint.decoded`."""
    if linear.format == "bf16":
        return linear.weight
    assert linear.weight_scale is not None
    if linear.format == "fp8":
        return decode_fp8(linear.weight, linear.weight_scale, torch.bfloat16)
    assert linear.tensor_scale is not None
    encoded = EncodedNVFP4(linear.weight, linear.weight_scale, linear.tensor_scale)
    return decode_nvfp4(encoded, torch.bfloat16)
