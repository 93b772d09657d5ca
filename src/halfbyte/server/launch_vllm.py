"""The application in front of a vLLM. Apart from `launch`, which imports no torch."""

import secrets

from fastapi import FastAPI

from halfbyte.chat.tokens import ChatFormat
from halfbyte.checkpoint.metadata import read_config
from halfbyte.server.api.admission import Admission
from halfbyte.server.api.backend import Backend
from halfbyte.server.api.preparer import Preparer
from halfbyte.server.http.app import app_over
from halfbyte.server.launch import Front
from halfbyte.server.ops.metrics import Metrics
from halfbyte.server.ops.supervise import Supervisor
from halfbyte.server.vllm.command import VllmPlan
from halfbyte.server.vllm.process import VllmProcess
from halfbyte.server.vllm.upstream import VllmUpstream


def launch_vllm(plan: VllmPlan, chat: ChatFormat, front: Front) -> FastAPI:
    """The application in front of a vLLM that it starts, restarts and ends.

    Raises CheckpointError, or UnsupportedError without vLLM.
    """
    key = secrets.token_urlsafe(32)
    text = read_config(plan.directory)[0].text
    config = front.config(
        plan.directory,
        plan.flags.get("max-model-len", text.max_positions),
        text.vocab_size,
        {"name": "vllm", "command": plan.command()},
    )
    metrics = Metrics()
    backend = Backend(
        Supervisor(VllmProcess(plan, key), lambda: VllmProcess(plan, key)),
        VllmUpstream(plan, key),
        Preparer(chat, config),
        Admission(config.limits, metrics),
        metrics,
    )
    app = app_over(backend, access_log=front.access_log, tracing=front.tracing)
    front.announce(
        app, [f"answers come from vLLM on port {plan.flags['port']}, which is not for users"]
    )
    return app
