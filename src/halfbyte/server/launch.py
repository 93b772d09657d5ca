"""A checkpoint directory to a ready application: engine, chat format, configuration, greeting."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from fastapi import FastAPI

from halfbyte.chat.tokens import load_chat
from halfbyte.checkpoint.identity import checkpoint_identity
from halfbyte.engine.options import EngineConfig
from halfbyte.engine.service import EngineService
from halfbyte.errors import UsageError, in_words
from halfbyte.files import read_bounded
from halfbyte.server.config import ImageFetch, Limits, ServerConfig
from halfbyte.server.defaults import SamplingDefaults
from halfbyte.server.dialect import Setting
from halfbyte.server.http.app import create_app
from halfbyte.server.http.gate import AccessLog, log_access
from halfbyte.server.ops.engine_process import EngineProcess
from halfbyte.server.ops.supervise import Supervisor
from halfbyte.server.ops.tracing import Tracing

DEFAULT_LIMITS = Limits()


def read_keys(given: list[str], file: Path | None) -> tuple[str, ...]:
    """API keys of the command line and of a file; UsageError if the file has none."""
    keys = [key for key in given if key]
    if file is not None:
        try:
            lines = read_bounded(file).decode("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read keys from {file}: {in_words(error)}") from error
        # A comment begins its line or follows a blank: a key itself may hold the sign.
        bare = (re.split(r"(?:^|\s)#", line, maxsplit=1)[0].strip() for line in lines)
        found = [key for key in bare if key]
        if not found:
            raise UsageError(f"{file} holds no key")
        keys += found
    return tuple(dict.fromkeys(keys))


@dataclasses.dataclass(frozen=True, slots=True)
class Front:
    """What the HTTP side is started with, whatever makes the answers."""

    names: tuple[str, ...]
    keys: tuple[str, ...] = ()
    image_hosts: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    limits: Limits = DEFAULT_LIMITS
    vllm_metric_names: bool = False
    sampling: SamplingDefaults = SamplingDefaults()  # noqa: RUF009  (frozen)
    unknown_fields: Literal["accept", "refuse"] = "accept"
    strict_effort: bool = False
    dialect: Setting = "auto"
    access_log: AccessLog | None = log_access
    tracing: Tracing | None = None

    def config(
        self, directory: Path, max_model_len: int, vocab_size: int, facts: Mapping[str, object]
    ) -> ServerConfig:
        """The server's configuration for the model of a directory."""
        return ServerConfig(
            model_names=self.names,
            max_model_len=max_model_len,
            vocab_size=vocab_size,
            api_keys=self.keys,
            limits=self.limits,
            image_fetch=ImageFetch(hosts=self.image_hosts),
            vllm_metric_names=self.vllm_metric_names,
            sampling=self.sampling,
            unknown_fields=self.unknown_fields,
            strict_effort=self.strict_effort,
            dialect=self.dialect,
            allowed_hosts=self.allowed_hosts,
            allowed_origins=self.allowed_origins,
            facts=(
                ("checkpoint", checkpoint_identity(directory)),
                *((f"engine_{key}", value) for key, value in facts.items()),
            ),
        )

    def announce(self, app: FastAPI, details: Sequence[str]) -> None:
        """Give the application its greeting, which `app.state.announce(url)` prints."""
        key = "API key required" if self.keys else "no API key is asked for"

        def announce(url: str) -> None:
            lines = [
                f"{self.names[0]} is ready at {url}/v1 (chat page: {url}/)",
                *details,
                f"{key}; limits: {url}/health; stop with Ctrl-C",
            ]
            print("\n  ".join(lines), flush=True)

        app.state.announce = announce
        # So that the first request with a schema, or of some length, does not wait for them.
        preparer = app.state.backend.preparer
        preparer.compiler.start()
        preparer.aside.start()


def launch(directory: Path, config: EngineConfig, front: Front) -> FastAPI:
    """Load everything and make the application; `app.state.announce(url)` says what it is.

    Raises CheckpointError, UsageError or CapacityError.
    """
    # The server's own limit answers first, with a time to come back.
    max_requests = front.limits.queued_requests * 2

    def load_again() -> EngineService:
        return EngineProcess(directory, config).service(max_requests=max_requests)

    process = EngineProcess(directory, config)
    try:
        # Meanwhile the engine is loaded.
        chat = load_chat(directory)
        service = process.service(max_requests=max_requests)
    except BaseException:
        process.close()
        raise
    loaded = service.loaded
    resolved = loaded.config
    app = create_app(
        Supervisor(service, load_again),
        chat,
        front.config(
            directory,
            loaded.max_model_len,
            loaded.vocab_size,
            {**dataclasses.asdict(resolved), **loaded.facts},
        ),
        access_log=front.access_log,
        tracing=front.tracing,
    )
    details = [
        f"context {resolved.max_model_len} tokens, {resolved.max_sequences} answers at once",
        f"KV cache {resolved.kv_cache_tokens} tokens in {resolved.kv_cache} on {resolved.device}",
    ]
    if resolved.speculative is not None:
        ahead = resolved.num_speculative_tokens
        details.append(f"speculation: {resolved.speculative}, up to {ahead} tokens ahead")
    front.announce(app, details)
    return app
