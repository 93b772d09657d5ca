"""What of a record may stand on a public page: no host, no path, no key, no answer.

Fields that exist to name machines and folders are left out as a whole; every other text, which may
quote an error or a command, loses what looks like an address, a path or a key (`scrubbed`).
`findings` names what is left of such things in a file that is about to be published.
"""

import dataclasses
import re
import shlex
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from halfbyte.evals.records import BenchmarkResult, RunRecord

# Hosts that everybody may reach and that a card has reason to name.
_PUBLIC_HOSTS = (
    "huggingface.co", "hf.co", "github.com", "arxiv.org", "apache.org", "opensource.org",
    "creativecommons.org", "mistral.ai", "nvidia.com", "pypi.org",
)  # fmt: skip
_KEY = re.compile(
    # No key is words alone, as hf_quant_config and sk_learn_pipeline are.
    r"\bhf_(?=[A-Za-z]*\d)[A-Za-z0-9]{12,}"
    r"|\b(?:sk|pk|rk|ghp|gho|ghs|github_pat|glpat|nvapi|xox[abpr])[-_](?=[A-Za-z_\-]*\d)"
    r"[A-Za-z0-9_\-]{12,}"
    r"|\bAKIA[0-9A-Z]{16}\b|\beyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]*"
    r"|(?i:\bbearer\s+)[A-Za-z0-9_\-.]{16,}"
    r"|(?i:\b(?:api[-_]?key|token|password|secret)[\"']?\s*[=:]\s*[\"']?)"
    r"(?=[A-Za-z_\-.]*\d)[A-Za-z0-9_\-.]{16,}"
)
_ADDRESS = re.compile(r"\b[a-z][a-z0-9+.-]*://[^\s\"'<>()\[\]|\\]+", re.IGNORECASE)
_OCTET = r"(?:25[0-5]|2[0-4]\d|1?\d?\d)"
# A bare host: four numbers, or names that only a private network resolves.
_HOST = re.compile(
    rf"(?<![\w.]){_OCTET}(?:\.{_OCTET}){{3}}(?::\d+)?(?![\w.])"
    r"|\blocalhost(?::\d+)?\b"
    r"|\b[\w-]+(?:\.[\w-]+)*\.(?:local|internal|intranet|lan|corp|home|svc)\b(?::\d+)?",
    re.IGNORECASE,
)
_PATH = re.compile(r"(?<![\w.:/<])(?:~|/[\w.@+-]+)(?:/[\w.@+-]+)+/?|\b[A-Za-z]:\\[^\s\"']+")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")

# What a server says of itself that judges its answers; its configuration names folders and hosts.
_SERVER_FACTS = (
    "version", "checkpoint", "max_model_len", "reasoning_efforts", "tools", "images",
    "engine_name", "engine_device", "engine_mode", "engine_kv_cache", "engine_max_model_len",
    "engine_tensor_parallel_size", "engine_products", "engine_speculative", "engine_deterministic",
)  # fmt: skip
_JUDGE_FACTS = ("model", "revision", "temperature", "max_tokens", "prompt_sha256")
_LEFT_OUT = "left out of what is published"


def scrubbed(value: Any) -> Any:
    """The same JSON value or dataclass, its texts without addresses, hosts, paths and keys."""
    if isinstance(value, str):
        return _scrubbed_text(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = (f.name for f in dataclasses.fields(value))
        return type(value)(**{name: scrubbed(getattr(value, name)) for name in fields})
    if isinstance(value, Mapping):
        return {_scrubbed_text(str(key)): scrubbed(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [scrubbed(one) for one in value]
    return value


def _scrubbed_text(text: str) -> str:
    text = _KEY.sub("[key]", text)
    pieces, end = [], 0
    for found in _ADDRESS.finditer(text):
        # A public address is kept whole: its path is no path of a machine.
        kept = found.group() if _is_public(found.group()) else "[address]"
        pieces += [_without_places(text[end : found.start()]), kept]
        end = found.end()
    return "".join([*pieces, _without_places(text[end:])])


def _without_places(text: str) -> str:
    return _PATH.sub("[path]", _HOST.sub("[address]", text))


def _is_public(address: str) -> bool:
    try:
        parts = urlsplit(address)
        host = (parts.hostname or "").lower()
    except ValueError:
        return False
    is_known = any(host == known or host.endswith(f".{known}") for known in _PUBLIC_HOSTS)
    return is_known and parts.username is None and parts.scheme in ("http", "https")


def published_run(run: RunRecord) -> RunRecord:
    """A run as the card and its reader may have it."""
    health = run.server.get("health") if isinstance(run.server, Mapping) else None
    facts = {}
    if isinstance(health, Mapping):
        facts = {name: health[name] for name in _SERVER_FACTS if name in health}
    judge = run.judge
    plain: dict[str, Any] = {
        f.name: getattr(run, f.name)
        for f in dataclasses.fields(RunRecord)
        if f.name != "benchmarks"
    }
    plain |= {
        "endpoint": _LEFT_OUT,
        "command": _LEFT_OUT,
        "server": {"health": facts} if facts else {},
        "checkpoint": {k: v for k, v in run.checkpoint.items() if k != "folder"},
        "judge": None if judge is None else {k: judge[k] for k in _JUDGE_FACTS if k in judge},
    }
    texts = {name: scrubbed(value) for name, value in plain.items()}
    results = {name: _published_result(one) for name, one in run.benchmarks.items()}
    return RunRecord(**texts, benchmarks=results)


def _published_result(result: BenchmarkResult) -> BenchmarkResult:
    plain = {f.name: scrubbed(getattr(result, f.name)) for f in dataclasses.fields(result)}
    provenance = dict(plain["provenance"])
    # A folder of the user's is named by its last two parts, which are nobody's business.
    if provenance and provenance.get("revision") is None:
        provenance["source"] = "a local copy"
    return BenchmarkResult(**{**plain, "provenance": provenance})


def published_figures(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of `halfbyte bench` or `compare --json`, its command without folders."""
    plain: dict[str, Any] = dict(record)
    if isinstance(plain.get("command"), str):
        plain["command"] = _without_folders(plain["command"])
    kept: dict[str, Any] = scrubbed(plain)
    return kept


def _without_folders(command: str) -> str:
    try:
        words = shlex.split(command)
    except ValueError:
        return _LEFT_OUT
    return shlex.join(w if "://" in w else w.rstrip("/").rpartition("/")[2] or w for w in words)


def findings(text: str) -> list[str]:
    """What a text for the public still holds of keys, private addresses and paths, once each.

    The loopback address in a command to copy is nobody's machine.
    """
    found = [f"what looks like a key: {key.group()[:6]}..." for key in _KEY.finditer(text)]
    addresses = [a for a in _ADDRESS.findall(text) if not _is_fine(a)]
    found += [f"an address of a private or unusual host: {address[:80]}" for address in addresses]
    rest = _ADDRESS.sub(" ", text)
    hosts = [h.group() for h in _HOST.finditer(rest) if not h.group().startswith(_LOOPBACK)]
    found += [f"a host: {host}" for host in hosts]
    found += [f"a path of a machine: {path.group()[:80]}" for path in _PATH.finditer(rest)]
    return list(dict.fromkeys(found))


def _is_fine(address: str) -> bool:
    try:
        parts = urlsplit(address)
        host, named = parts.hostname or "", parts.username
    except ValueError:
        return False
    if named is not None:
        return False
    return host in _LOOPBACK or not (_HOST.fullmatch(host) or "." not in host)
