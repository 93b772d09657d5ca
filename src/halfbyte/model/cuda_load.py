"""Checkpoint -> `CudaWeights`: parallel reads through pinned memory, repacking on the device.

Reader threads fill staging buffers of their own and copy them to the device; while one layer's
tensors are repacked there, the next layer's are on their way. Everything runs on a CPU as well,
without pinned memory and streams, which is how it is tested.

Shapes: O, I features; B 16-blocks along I.
"""

import math
import os
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from halfbyte.checkpoint.names import native_to_hub_rows, rotary_heads
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.checkpoint.shards import StoredTensor, bytes_of
from halfbyte.errors import CheckpointError, UnsupportedError
from halfbyte.kernels.repack import tile_nvfp4, tile_rows
from halfbyte.log import logger
from halfbyte.model.cuda_decoder import CudaLayer, CudaLinear, CudaWeights
from halfbyte.modules import CacheFormat

_PIECE_BYTES = 32 << 20
_QKV, _GATED = ("q", "k", "v"), ("gate", "up")
# Largest activation of a layer as a multiple of the largest one calibration saw.
_HEADROOM = 4.0
_F16_MAX = 65504.0


def reason_against(
    checkpoint: Checkpoint, kv_cache: CacheFormat, block_tokens: int, *, prefill: str = "exact"
) -> str | None:
    """Why the CUDA kernels cannot run this model; None when they can. Reads no tensor data."""
    text, formats = checkpoint.config.text, checkpoint.quantization.formats
    if kv_cache != "fp8":
        return f"the KV cache is {kv_cache}; the kernels read FP8 (kv_cache fp8 forces it)"
    if block_tokens % 16:
        return f"blocks of {block_tokens} tokens; the kernels want a multiple of 16"
    if text.head_dim not in (64, 128):
        return f"heads of {text.head_dim}; the kernels are written for 64 and 128"
    if text.num_heads // text.num_kv_heads > 16:
        return f"{text.num_heads // text.num_kv_heads} query heads a KV head; the kernels take 16"
    if text.width % 64 or text.mlp_width % 8:
        return f"width {text.width}, MLP {text.mlp_width}; multiples of 64 and 8 are needed"
    if prefill == "fast" and text.mlp_width > 48 * 1024:
        return f"MLP of {text.mlp_width}; prefill in mode fast takes {48 * 1024}"
    for layer in range(text.num_layers):
        prefix = f"decoder.{layer}"
        for group in _groups(prefix):
            kinds = {formats.get(name, "bf16") for name in group}
            if len(kinds) > 1:
                return f"{group[0]} and its neighbours are in {' and '.join(sorted(kinds))}"
            if kinds == {"nvfp4"} and group[0].endswith(".o"):
                return f"{group[0]} is NVFP4; the kernels want it in FP8 or bf16"
            lacking = [
                n for n in group if kinds == {"fp8"} and f"{n}.input_scale" not in checkpoint
            ]
            if lacking:
                return f"{lacking[0]} is FP8 without an input scale, which FP8 products need"
    return None


def _groups(prefix: str) -> tuple[list[str], ...]:
    """A layer's linears, those that read one input together."""
    return (
        [f"{prefix}.attention.{short}" for short in _QKV],
        [f"{prefix}.attention.o"],
        [f"{prefix}.mlp.{short}" for short in _GATED],
        [f"{prefix}.mlp.down"],
    )


class _Arrived(NamedTuple):
    """A piece's bytes are read; on a GPU their copy is enqueued before `event`."""

    event: torch.cuda.Event | None


class _Staging(threading.local):
    """A reader thread's two staging buffers and its stream."""

    buffers: list[Tensor]
    events: list[torch.cuda.Event | None]
    stream: torch.cuda.Stream | None
    turn: int


class TensorReader:
    """Reads stored tensors into device memory, many pieces at a time."""

    def __init__(
        self,
        device: torch.device,
        *,
        num_threads: int | None = None,
        piece_bytes: int | None = None,
    ) -> None:
        self.device = device
        self.num_bytes = 0
        self._piece_bytes = piece_bytes or _PIECE_BYTES
        self._is_cuda = device.type == "cuda"
        threads = num_threads or min(12, max(2, (os.cpu_count() or 2) - 1))
        self._pool = ThreadPoolExecutor(threads, "halfbyte-read", initializer=self._start_thread)
        self._staging = _Staging()

    def _start_thread(self) -> None:
        staging = self._staging
        staging.buffers = [
            torch.empty(self._piece_bytes, dtype=torch.uint8, pin_memory=self._is_cuda)
            for _ in range(2)
        ]
        staging.events = [None, None]
        staging.turn = 0
        staging.stream = None
        if self._is_cuda:
            torch.cuda.set_device(self.device)
            staging.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    def __enter__(self) -> "TensorReader":
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def read_into(self, stored: StoredTensor, target: Tensor) -> list["Future[_Arrived]"]:
        """Start reading `stored` into `target`, contiguous and of its size, on the device.

        What `target`'s memory was used for before must be enqueued on the current stream.
        """
        flat = target.reshape(-1).view(torch.uint8)
        assert flat.data_ptr() == target.data_ptr() and flat.numel() == stored.num_bytes
        self.num_bytes += stored.num_bytes
        is_free = None
        if self._is_cuda:
            is_free = torch.cuda.Event()  # type: ignore[no-untyped-call]
            is_free.record()
        return [
            self._pool.submit(self._read_piece, stored, start, flat, is_free)
            for start in range(0, stored.num_bytes, self._piece_bytes)
        ]

    def _read_piece(
        self, stored: StoredTensor, start: int, flat: Tensor, is_free: torch.cuda.Event | None
    ) -> _Arrived:
        stop = min(start + self._piece_bytes, stored.num_bytes)
        staging = self._staging
        staging.turn ^= 1
        used = staging.events[staging.turn]
        if used is not None:
            used.synchronize()
        buffer = staging.buffers[staging.turn][: stop - start]
        _fill(stored, bytes_of(buffer), start)
        if staging.stream is None:
            flat[start:stop].copy_(buffer)
            return _Arrived(None)
        with torch.cuda.stream(staging.stream):
            if is_free is not None:
                staging.stream.wait_event(is_free)
            flat[start:stop].copy_(buffer, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(staging.stream)
        staging.events[staging.turn] = event
        return _Arrived(event)

    def wait(self, pieces: Iterable["Future[_Arrived]"]) -> None:
        """Return once the pieces are read; the current stream waits for their copies."""
        for piece in pieces:
            event = piece.result().event
            if event is not None:
                torch.cuda.current_stream().wait_event(event)


def _fill(stored: StoredTensor, buffer: memoryview, start: int) -> None:
    done = 0
    try:
        with stored.path.open("rb", buffering=0) as file:
            while done < len(buffer):
                got = os.preadv(file.fileno(), [buffer[done:]], stored.offset + start + done)
                if got == 0:
                    raise CheckpointError(
                        f"{stored.path.name}: ended within {stored.name}; changed while being read?"
                    )
                done += got
    except OSError as error:
        raise CheckpointError(
            f"{stored.path.name}: {stored.name} cannot be read ({error.strerror})"
        ) from error


class _Tensors:
    """Tensors of one checkpoint on their way to the device, and which were taken."""

    def __init__(self, checkpoint: Checkpoint, reader: TensorReader) -> None:
        self._checkpoint = checkpoint
        self._reader = reader
        self._names = frozenset(checkpoint.names())
        self._taken: set[str] = set()
        self._coming: dict[str, tuple[Tensor, list[Future[_Arrived]]]] = {}
        self._stacks: dict[tuple[str, ...], Tensor] = {}

    def start(self, name: str, target: Tensor | None = None) -> None:
        """Begin to read a tensor, into `target` if given."""
        stored = self._checkpoint.stored(name)
        if target is None:
            target = torch.empty(stored.shape, dtype=stored.dtype, device=self._reader.device)
        self._coming[name] = (target, self._reader.read_into(stored, target))

    def start_stacked(self, names: Sequence[str]) -> None:
        """Begin to read tensors of one width into one matrix, one below the other."""
        stored = [self._checkpoint.stored(name) for name in names]
        rows = sum(s.shape[0] for s in stored)
        shape = (rows, *stored[0].shape[1:])
        whole = torch.empty(shape, dtype=stored[0].dtype, device=self._reader.device)
        first = 0
        for name, one in zip(names, stored, strict=True):
            self.start(name, whole[first : first + one.shape[0]])
            first += one.shape[0]
        self._stacks[tuple(names)] = whole

    def take(self, name: str) -> Tensor:
        """A tensor that was started; q and k in hub row order."""
        self._taken.add(name)
        target, pieces = self._coming.pop(name)
        self._reader.wait(pieces)
        if self._checkpoint.layout == "mistral" and target.dim() >= 2:
            heads = rotary_heads(name, self._checkpoint.config)
            if heads is not None:
                target.view(torch.uint8).copy_(native_to_hub_rows(target.view(torch.uint8), heads))
        return target

    def take_stacked(self, names: Sequence[str]) -> Tensor:
        for name in names:
            self.take(name)
        return self._stacks.pop(tuple(names))

    def scalar(self, name: str) -> float:
        self._taken.add(name)
        return self._checkpoint.scalar(name)

    def optional_scalar(self, name: str) -> float | None:
        return self.scalar(name) if name in self._names else None

    def check_all_taken(self) -> None:
        left = sorted(
            name
            for name in self._names - self._taken
            if not name.startswith(("encoder.", "projector."))
        )
        if left:
            raise CheckpointError(f"{len(left)} tensors are not used by the model: {left[:3]}")


def load_cuda_weights(
    checkpoint: Checkpoint,
    device: torch.device,
    *,
    num_threads: int | None = None,
    num_spare_embeddings: int = 0,
) -> CudaWeights:
    """The text model in streaming order on `device`; `reason_against` must have found nothing.

    num_spare_embeddings  zero rows behind the vocabulary's, for vectors of images
    Raises CheckpointError for a tensor that cannot be read and for one that nothing reads.
    """
    text = checkpoint.config.text
    with TensorReader(device, num_threads=num_threads) as reader:
        tensors = _Tensors(checkpoint, reader)
        rows = text.vocab_size + num_spare_embeddings
        embedding_VD = torch.zeros(rows, text.width, dtype=torch.bfloat16, device=device)
        _check_bf16(checkpoint, "embedding.weight")
        tensors.start("embedding.weight", embedding_VD[: text.vocab_size])
        if not text.tied_head:
            _check_bf16(checkpoint, "head.weight")
            tensors.start("head.weight")
        tensors.start("norm.weight")
        _start_layer(tensors, checkpoint, 0)
        tensors.take("embedding.weight")
        head_VD = embedding_VD[: text.vocab_size] if text.tied_head else tensors.take("head.weight")
        ones = torch.ones(text.vocab_size, device=device)
        head = CudaLinear(tile_rows(head_VD, ones, "bf16"))
        del head_VD
        norm_D = tensors.take("norm.weight").to(torch.bfloat16)
        layers = []
        for index in range(text.num_layers):
            if index + 1 < text.num_layers:
                _start_layer(tensors, checkpoint, index + 1)
            layers.append(_take_layer(tensors, checkpoint, index))
        tensors.check_all_taken()
    return CudaWeights(text, embedding_VD, tuple(layers), norm_D, head)


def _check_bf16(checkpoint: Checkpoint, name: str) -> None:
    if checkpoint.dtype(name) != torch.bfloat16:
        raise UnsupportedError(f"{name} is {checkpoint.dtype(name)}; the kernels want bf16")


def _start_layer(tensors: _Tensors, checkpoint: Checkpoint, index: int) -> None:
    prefix = f"decoder.{index}"
    tensors.start(f"{prefix}.attention_norm.weight")
    tensors.start(f"{prefix}.mlp_norm.weight")
    for group in _groups(prefix):
        tensors.start_stacked([f"{name}.weight" for name in group])
        if checkpoint.format_of(group[0]) == "nvfp4":
            tensors.start_stacked([f"{name}.weight_scale" for name in group])


def _take_layer(tensors: _Tensors, checkpoint: Checkpoint, index: int) -> CudaLayer:
    prefix = f"decoder.{index}"
    qkv, o, gate_up, down = (_take_linear(tensors, checkpoint, g) for g in _groups(prefix))
    k_scale = tensors.optional_scalar(f"{prefix}.attention.k_scale")
    v_scale = tensors.optional_scalar(f"{prefix}.attention.v_scale")
    return CudaLayer(
        tensors.take(f"{prefix}.attention_norm.weight").to(torch.bfloat16),
        qkv,
        o,
        tensors.take(f"{prefix}.mlp_norm.weight").to(torch.bfloat16),
        gate_up,
        down,
        k_scale=1.0 if k_scale is None else k_scale,
        v_scale=1.0 if v_scale is None else v_scale,
    )


def _take_linear(tensors: _Tensors, checkpoint: Checkpoint, group: list[str]) -> CudaLinear:
    """A group's weights as one tiled weight, and what its input is divided by."""
    format_ = checkpoint.format_of(group[0])
    w_OI = tensors.take_stacked([f"{name}.weight" for name in group])
    sizes = [checkpoint.shape(f"{name}.weight")[0] for name in group]
    if format_ == "bf16":
        ones = torch.ones(w_OI.shape[0], device=w_OI.device)
        return CudaLinear(tile_rows(w_OI.to(torch.bfloat16), ones, "bf16"))
    input_scales = [tensors.optional_scalar(f"{name}.input_scale") for name in group]
    known = [scale for scale in input_scales if scale is not None]
    if format_ == "fp8":
        scales = [tensors.scalar(f"{name}.weight_scale") for name in group]
        if len(set(known)) > 1:
            logger.debug("%s: input scales differ; the largest serves all", group[0])
        weight = tile_rows(w_OI, _per_row(scales, sizes, w_OI), "fp8")
        return CudaLinear(weight, max(known))
    scale_OB = tensors.take_stacked([f"{name}.weight_scale" for name in group])
    scales = [tensors.scalar(f"{name}.tensor_scale") for name in group]
    weight = tile_nvfp4(w_OI, scale_OB, _per_row(scales, sizes, w_OI))
    return CudaLinear(weight, f16_divisor(max(known)) if known else 1.0)


def f16_divisor(input_scale: float) -> float:
    """The power of two that keeps activations inside fp16: 1.0 unless they are extreme.

    input_scale  of NVFP4 activations: the largest that calibration saw is 6 * 448 times it
    """
    largest = input_scale * 6.0 * 448.0 * _HEADROOM
    return 2.0 ** max(0, math.ceil(math.log2(largest / _F16_MAX))) if largest > 0 else 1.0


def _per_row(scales: Sequence[float], sizes: Sequence[int], like: Tensor) -> Tensor:
    """Each member's scale, repeated for its rows: f32 (O,)."""
    values = torch.tensor(scales, dtype=torch.float32)
    return values.repeat_interleave(torch.tensor(sizes)).to(like.device)
