"""The process of vLLM: started, watched until it answers, ended."""

import asyncio
import contextlib
import os
import shutil
import signal

import httpx

from halfbyte.errors import RequestError, UnsupportedError
from halfbyte.server.vllm.command import VllmPlan

_POLL_S = 0.5
_START_S, _STOP_S = 1800.0, 20.0


class VllmProcess:
    """The process of vLLM, started and watched; a `Supervisor` keeps it running."""

    def __init__(self, plan: VllmPlan, key: str) -> None:
        """Take the `key` that vLLM will ask for; UnsupportedError if vLLM is not installed."""
        if shutil.which("vllm") is None:
            raise UnsupportedError(
                "vLLM is not installed here (no `vllm` on the PATH); --print shows the command"
            )
        self._plan = plan
        self._process: asyncio.subprocess.Process | None = None
        self._key = key
        self._url = f"http://127.0.0.1:{plan.flags['port']}"

    @property
    def is_alive(self) -> bool:
        """Whether the process runs; False once it has ended."""
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Start vLLM and wait until it answers; UnsupportedError if it ends instead."""
        self._process = await asyncio.create_subprocess_exec(
            *self._plan.command(),
            # Not in the command, where every user of the machine could read it.
            env={**os.environ, "VLLM_API_KEY": self._key},
            stdin=asyncio.subprocess.DEVNULL,
            # Its workers are its children; they end together.
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(_START_S):
                await self._until_healthy()
        except BaseException:
            await self.stop()
            raise

    async def _until_healthy(self) -> None:
        assert self._process is not None
        async with httpx.AsyncClient(base_url=self._url, trust_env=False, timeout=10) as client:
            while True:
                if self._process.returncode is not None:
                    raise UnsupportedError(
                        f"vLLM ended with status {self._process.returncode}; it says why above"
                    )
                with contextlib.suppress(httpx.HTTPError):
                    if (await client.get("/health")).status_code == 200:
                        return
                await asyncio.sleep(_POLL_S)

    async def stop(self, drain_s: float = 0.0) -> None:
        """End vLLM and its workers; the server has waited for running answers before."""
        process = self._process
        if process is None:
            return
        _signal(process.pid, signal.SIGTERM)
        try:
            async with asyncio.timeout(_STOP_S):
                await process.wait()
        except TimeoutError:
            pass
        _signal(process.pid, signal.SIGKILL)
        await process.wait()

    def clear_prefix_cache(self) -> None:
        raise RequestError(
            "vLLM keeps its own prefix cache", code="unsupported_parameter", status=400
        )

    async def stacks(self) -> str:
        """Nothing but that vLLM does not say where its threads are."""
        return "vLLM does not say where its threads are"

    def stats(self) -> None:
        """None, as vLLM serves its figures at its own /metrics."""


def _signal(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)
