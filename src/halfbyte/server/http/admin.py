"""Routes for whoever runs the server, on a listener of their own: look, abort, drain, forget.

Off unless `--admin-port` is given, and then on the loopback address unless said otherwise. The same
API keys are asked for as elsewhere.
"""

import time
from typing import Any

from fastapi import FastAPI
from starlette.responses import JSONResponse, PlainTextResponse, Response

import halfbyte
from halfbyte.errors import RequestError
from halfbyte.server.api.backend import Backend, Running
from halfbyte.server.http.app import add_error_handlers
from halfbyte.server.http.gate import AccessLog, Gate, Keys, log_access
from halfbyte.server.http.origins import Origins
from halfbyte.server.http.state import METRICS_TYPE, add_health
from halfbyte.server.ops import process_figures as process


def create_admin(backend: Backend, *, access_log: AccessLog | None = log_access) -> FastAPI:
    """Make the application of the admin listener, with the routes for operators."""
    app = FastAPI(
        title="halfbyte admin", version=halfbyte.__version__, docs_url=None, redoc_url=None
    )
    _add_looking(app, backend)
    _add_acting(app, backend)
    add_health(app, backend)
    add_error_handlers(app, backend)
    app.add_middleware(
        Gate,
        keys=Keys(backend.config.api_keys),
        metrics=None,
        access_log=access_log,
        # No page of another origin, whoever may use the API.
        origins=Origins(backend.config.allowed_hosts),
    )
    return app


def _add_looking(app: FastAPI, backend: Backend) -> None:
    @app.get("/metrics")
    async def metrics() -> Response:
        """Counters and histograms in Prometheus text."""
        return PlainTextResponse(backend.metrics_text(), media_type=METRICS_TYPE)

    @app.get("/requests")
    async def requests() -> Response:
        """Answers in work, oldest first."""
        now = time.monotonic()
        found = [_described(running, now) for running in backend.running.values()]
        return JSONResponse({"requests": found})

    @app.get("/state")
    async def state() -> Response:
        """Memory, open files, threads and tasks of the process, and the engine's figures."""
        return JSONResponse(
            {
                "process": process.figures(),
                "engine": backend.engine_figures(),
                "running": len(backend.running),
                "draining": backend.admission.is_draining,
            }
        )

    @app.get("/stacks")
    async def stacks() -> Response:
        """Where every thread and task is, of the server and of the engine."""
        return PlainTextResponse(f"{process.stacks()}\n{await backend.service.stacks()}")


def _add_acting(app: FastAPI, backend: Backend) -> None:
    @app.post("/requests/{answer_id}/abort")
    async def abort(answer_id: str) -> Response:
        """End one answer; its client gets an error."""
        running = backend.running.get(answer_id)
        if running is None:
            raise RequestError(f"no answer {answer_id!r} is in work", code="not_found", status=404)
        backend.answers.abort(running.job)
        return JSONResponse({"aborted": answer_id})

    @app.post("/drain")
    async def drain() -> Response:
        """Refuse new requests with 503; running ones go on. /ready says no."""
        backend.admission.is_draining = True
        return JSONResponse({"draining": True, "running": len(backend.running)})

    @app.post("/resume")
    async def resume() -> Response:
        """Take new requests again after a drain."""
        backend.admission.is_draining = False
        return JSONResponse({"draining": False})

    @app.post("/prefix-cache/clear")
    async def clear() -> Response:
        """Forget the cached beginnings of prompts."""
        backend.service.clear_prefix_cache()
        return JSONResponse({"cleared": True})


def _described(running: Running, now: float) -> dict[str, Any]:
    return {
        "request_id": running.call.request_id,
        "key": running.call.key,
        "age_s": round(now - running.started_s, 3),
        **running.job.facts(),
    }
