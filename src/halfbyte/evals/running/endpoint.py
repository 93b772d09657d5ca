"""The server under test: an address, what it says of itself, and starting one for a folder."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from halfbyte.checkpoint.identity import checkpoint_identity
from halfbyte.child import served
from halfbyte.errors import UsageError, in_words
from halfbyte.evals.tasks.data import file_sha256
from halfbyte.files import is_there


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Address and key of an OpenAI-compatible server, and what it says of itself.

    url            base address that ends in /v1
    model          name to send in requests
    context_tokens longest prompt plus answer, if the server says it
    server         what /v1/models and /health say, for the record
    """

    url: str
    model: str
    context_tokens: int | None
    server: Mapping[str, Any]


def connect(url: str, model: str | None, api_key: str, *, take_first: bool = False) -> Endpoint:
    """Ask a server for its models. Raises UsageError with the reason if it cannot be used.

    take_first  without `model`: the first name will do, all of them are one model
    """
    base = base_address(url)
    headers = {"Authorization": f"Bearer {api_key}"}
    try:
        answer = httpx.get(f"{base}/models", headers=headers, timeout=30)
        if answer.status_code in (401, 403):
            raise UsageError(
                f"{base} asks for an API key (status {answer.status_code}): put it into an "
                "environment variable and name that with --api-key-env"
            )
        answer.raise_for_status()
        models = {entry["id"]: entry for entry in answer.json()["data"]}
    except httpx.TransportError as failure:
        raise UsageError(
            f"{base}: no server answers there ({in_words(failure)}); is it up, and is this its "
            "address?"
        ) from failure
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as failure:
        raise UsageError(
            f"{base}/models does not answer as an OpenAI-compatible server: {in_words(failure)}"
        ) from failure
    if model is None:
        if not models or (len(models) > 1 and not take_first):
            raise UsageError(f"{base} serves {', '.join(models) or 'nothing'}; choose with --model")
        model = next(iter(models))
    if model not in models:
        raise UsageError(f"{base} has no model {model!r}; it serves {', '.join(models)}")
    entry = models[model]
    health = _health(base.removesuffix("/v1"), headers)
    context = entry.get("max_model_len") or entry.get("context_length")
    return Endpoint(
        base, model, int(context) if context else None, {"model": entry, "health": health}
    )


def read_key(variable: str | None) -> str:
    """The API key in an environment variable; "none" without one. Raises UsageError if unset."""
    if variable is None:
        return "none"
    if variable not in os.environ:
        raise UsageError(f"--api-key-env {variable}: the environment has no such variable")
    return os.environ[variable]


def is_here(url: str) -> bool:
    """Whether an address is this machine's own loopback."""
    host = httpx.URL(url).host
    return host == "localhost" or host == "::1" or host.startswith("127.")


def base_address(url: str) -> str:
    """The address below which ``/chat/completions`` and ``/models`` lie.

    ``/v1`` is added to a bare host only: who names a path, such as ``/v1beta/openai``, means it.
    Examples: ``host:8000`` -> ``http://host:8000/v1``; ``https://a/openai/v1/chat/completions`` ->
    ``https://a/openai/v1``. Raises UsageError for what is no http address.
    """
    base = url.strip()
    if "://" not in base:
        base = f"http://{base}"
    try:
        parts = httpx.URL(base)
    except httpx.InvalidURL as failure:
        raise UsageError(f"{url!r} is not the address of a server: {failure}") from failure
    if parts.scheme not in ("http", "https") or not parts.host:
        raise UsageError(
            f"{url!r} is not the address of a server; give http://HOST:PORT or a folder"
        )
    path = parts.path.rstrip("/")
    for end in ("/chat/completions", "/completions", "/models"):
        path = path.removesuffix(end)
    return str(parts.copy_with(path=path or "/v1", query=None, fragment=None))


def _health(root: str, headers: Mapping[str, str]) -> Any:
    try:
        answer = httpx.get(f"{root}/health", headers=dict(headers), timeout=10)
        return answer.json() if answer.is_success else None
    except (httpx.HTTPError, ValueError):
        return None  # other servers have none, or send no JSON


def describe_checkpoint(folder: Path) -> dict[str, Any]:
    """Facts that identify a checkpoint folder, by name.

    `identity` (`checkpoint.identity`), the hashes of its configuration and index, its formats.
    `note` is what its NOTE.txt says (`checkpoint.fp8_source` copies it from arm to arm), which
    belongs beside every figure.
    """
    about: dict[str, Any] = {
        "folder": folder.resolve().name,
        "identity": checkpoint_identity(folder),
    }
    if (folder / "NOTE.txt").is_file():
        about["note"] = " ".join((folder / "NOTE.txt").read_text(encoding="utf-8").split())
    for name in ("config.json", "hf_quant_config.json", "model.safetensors.index.json"):
        if is_there(folder / name):
            about[f"{name} sha256"] = file_sha256(folder / name)
    weights = sorted(folder.glob("*.safetensors"))
    about["weight files"] = {path.name: path.stat().st_size for path in weights}
    # The headers name every tensor, its type and place: a cheap fingerprint of the whole.
    digest = hashlib.sha256()
    for path in weights:
        with path.open("rb") as file:
            digest.update(file.read(int.from_bytes(file.read(8), "little")))
    about["headers sha256"] = digest.hexdigest()
    config = folder / "config.json"
    if is_there(config):
        about["quantization_config"] = json.loads(config.read_text()).get("quantization_config")
    return about


def describe_served(endpoint: Endpoint, folder: Path | None) -> dict[str, Any]:
    """What is known of the weights behind an address; {} if nothing.

    Our server says the identity of what it serves; of another, the user may name the folder.
    Raises UsageError if the server says that it serves another checkpoint than the folder's.
    """
    health = endpoint.server.get("health")
    said = health.get("checkpoint") if isinstance(health, Mapping) else None
    if folder is None:
        return {"identity": said} if isinstance(said, str) else {}
    about = describe_checkpoint(folder)
    if isinstance(said, str) and said != about["identity"]:
        raise UsageError(
            f"--checkpoint {folder} is {about['identity'][:20]}..., but {endpoint.url} serves "
            f"{said[:20]}...: name the folder that is served"
        )
    return about


@contextlib.contextmanager
def serve(folder: Path, log: Path, extra: tuple[str, ...] = ()) -> Iterator[str]:
    """Run `halfbyte serve FOLDER` beside us; yields its address, ends it at the end.

    If we are killed it ends too (Linux), or a resumed run would find its memory taken. Raises as
    `child.served`.
    """
    with served(folder, *extra, log=log) as server:
        yield server.url
