"""A checkpoint directory to a ready application: engine, chat format, configuration, greeting."""

import dataclasses
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from fastapi import FastAPI

from halfbyte.chat.tokens import ChatFormat, load_chat
from halfbyte.checkpoint.identity import checkpoint_identity
from halfbyte.checkpoint.metadata import read_config
from halfbyte.engine.config import EngineConfig
from halfbyte.engine.core import Engine
from halfbyte.engine.service import EngineService
from halfbyte.errors import UsageError
from halfbyte.files import read_bounded
from halfbyte.machine import settle_heap
from halfbyte.server.config import ImageFetch, Limits, ServerConfig
from halfbyte.server.defaults import SamplingDefaults
from halfbyte.server.dialect import Setting
from halfbyte.server.http.app import create_app
from halfbyte.server.http.gate import AccessLog, log_access
from halfbyte.server.ops.supervise import Supervisor
from halfbyte.server.ops.tracing import Tracing
from halfbyte.server.vllm.command import VllmPlan
from halfbyte.server.vllm.process import VllmProcess
from halfbyte.server.vllm.upstream import VllmUpstream

DEFAULT_LIMITS = Limits()


def read_keys(given: list[str], file: Path | None) -> tuple[str, ...]:
    """API keys of the command line and of a file; UsageError if the file has none."""
    keys = [key for key in given if key]
    if file is not None:
        try:
            lines = read_bounded(file).decode("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read keys from {file}: {error}") from error
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
        app.state.backend.compiler.start()
        app.state.backend.aside.start()


def launch(directory: Path, config: EngineConfig, front: Front) -> FastAPI:
    """Load everything and make the application; `app.state.announce(url)` says what it is.

    Raises CheckpointError, UsageError or CapacityError.
    """
    chat = load_chat(directory)
    engine = Engine.load(directory, config)

    def service_of(engine: Engine) -> EngineService:
        # The server's own limit answers first, with a time to come back.
        return EngineService(engine, max_requests=front.limits.queued_requests * 2)

    def load_again() -> EngineService:
        settle_heap()  # what is left of the dead engine
        again = service_of(Engine.load(directory, config))
        settle_heap()
        return again

    resolved = engine.config
    app = create_app(
        Supervisor(service_of(engine), load_again),
        chat,
        front.config(
            directory,
            engine.max_model_len,
            engine.vocab_size,
            {**dataclasses.asdict(resolved), **engine.facts()},
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


def launch_vllm(plan: VllmPlan, chat: ChatFormat, front: Front) -> FastAPI:
    """The application in front of a vLLM that it starts, restarts and ends.

    Raises CheckpointError, or UnsupportedError without vLLM.
    """
    key = secrets.token_urlsafe(32)
    text = read_config(plan.directory)[0].text
    app = create_app(
        Supervisor(VllmProcess(plan, key), lambda: VllmProcess(plan, key)),
        chat,
        front.config(
            plan.directory,
            plan.flags.get("max-model-len", text.max_positions),
            text.vocab_size,
            {"name": "vllm", "command": plan.command()},
        ),
        access_log=front.access_log,
        tracing=front.tracing,
        upstream=VllmUpstream(plan, key),
    )
    front.announce(
        app, [f"answers come from vLLM on port {plan.flags['port']}, which is not for users"]
    )
    return app
