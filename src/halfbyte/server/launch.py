"""A checkpoint directory to a ready application: engine, chat format, configuration, greeting."""

import argparse
import dataclasses
from pathlib import Path

import torch
from fastapi import FastAPI

from halfbyte.chat.tokens import load_chat
from halfbyte.engine.config import EngineConfig
from halfbyte.engine.core import Engine
from halfbyte.engine.service import EngineService
from halfbyte.errors import UsageError
from halfbyte.server.app import create_app
from halfbyte.server.config import ImageFetch, Limits, ServerConfig
from halfbyte.server.gate import AccessLog, log_access
from halfbyte.server.supervise import Supervisor
from halfbyte.server.tracing import Tracing

DEFAULT_LIMITS = Limits()


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """The engine's configuration from the flags of `halfbyte serve` and `chat`."""
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return EngineConfig(
        max_model_len=args.max_model_len,
        max_sequences=args.max_sequences,
        kv_cache_tokens=args.kv_cache_tokens,
        mode=args.mode,
        device=device,
        gpu_memory_utilization=args.gpu_memory_utilization,
        tensor_parallel_size=args.tensor_parallel_size,
        accept=tuple(args.accept),
        speculative=args.speculative,
        num_speculative_tokens=args.num_speculative_tokens,
    )


def read_keys(given: list[str], file: Path | None) -> tuple[str, ...]:
    """API keys of the command line and of a file; UsageError if the file has none."""
    keys = [key for key in given if key]
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read keys from {file}: {error}") from error
        found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not found:
            raise UsageError(f"{file} holds no key")
        keys += found
    return tuple(dict.fromkeys(keys))


def launch(
    directory: Path,
    config: EngineConfig,
    *,
    names: tuple[str, ...],
    keys: tuple[str, ...] = (),
    image_hosts: tuple[str, ...] = (),
    limits: Limits = DEFAULT_LIMITS,
    vllm_metric_names: bool = False,
    access_log: AccessLog | None = log_access,
    tracing: Tracing | None = None,
) -> FastAPI:
    """Load everything and make the application; `app.state.announce(url)` says what it is.

    Raises CheckpointError, UsageError or CapacityError.
    """
    chat = load_chat(directory)
    engine = Engine.load(directory, config)

    def service_of(engine: Engine) -> EngineService:
        # The server's own limit answers first, with a time to come back.
        return EngineService(engine, max_requests=limits.queued_requests * 2)

    def load_again() -> EngineService:
        return service_of(Engine.load(directory, config))

    resolved = engine.config
    app = create_app(
        Supervisor(service_of(engine), load_again),
        chat,
        ServerConfig(
            model_names=names,
            max_model_len=engine.max_model_len,
            vocab_size=engine.vocab_size,
            api_keys=keys,
            limits=limits,
            image_fetch=ImageFetch(hosts=image_hosts),
            vllm_metric_names=vllm_metric_names,
            facts=tuple(
                (f"engine_{key}", value) for key, value in dataclasses.asdict(resolved).items()
            ),
        ),
        access_log=access_log,
        tracing=tracing,
    )

    speculation = ""
    if resolved.speculative is not None:
        speculation = (
            f"  speculation: {resolved.speculative}, up to "
            f"{resolved.num_speculative_tokens} tokens ahead\n"
        )

    def announce(url: str) -> None:
        print(
            f"{names[0]} is ready at {url}/v1 (chat page: {url}/)\n"
            f"  context {resolved.max_model_len} tokens, {resolved.max_sequences} answers at once\n"
            f"  KV cache {resolved.kv_cache_tokens} tokens in {resolved.kv_cache} "
            f"on {resolved.device}\n"
            f"{speculation}"
            f"  {'API key required' if keys else 'no API key is asked for'}; "
            f"limits: {url}/health; stop with Ctrl-C",
            flush=True,
        )

    app.state.announce = announce
    return app
