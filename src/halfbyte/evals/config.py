"""What a run is asked to do, and what of it must not change in between."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from halfbyte.evals.grading.judge import JUDGE_PROMPT_SHA256
from halfbyte.evals.sandbox import SandboxLimits
from halfbyte.evals.tasks.benchmark import Benchmark, Options
from halfbyte.evals.tasks.pocket import MAX_TOKENS
from halfbyte.evals.tasks.suite import SUITES


@dataclass(frozen=True, slots=True)
class RunSampling:
    """Sampling settings; the defaults are those of the published table."""

    temperature: float = 0.7
    top_p: float = 0.95
    reasoning_effort: str | None = "high"
    max_tokens: int = 65_536


def sampling_of(benchmarks: Sequence[Benchmark]) -> RunSampling:
    """How answers are drawn where the command does not say.

    Pocket is measured greedily, as its checkpoint recommends, and its answers are short; anything
    else, and any mixture, by the settings of the published table.
    """
    if benchmarks and all(benchmark.name in SUITES["pocket"] for benchmark in benchmarks):
        return RunSampling(temperature=0.0, top_p=1.0, max_tokens=MAX_TOKENS)
    return RunSampling()


@dataclass(frozen=True, slots=True)
class JudgeConfig:
    """The judge of AA-LCR: where it is served, its name as served, and its revision as told."""

    url: str
    model: str
    revision: str = "not stated"
    api_key: str = "none"
    max_tokens: int = 4_096

    def public(self) -> dict[str, Any]:
        """What the record keeps: everything but the key."""
        about = {"url": self.url, "model": self.model, "revision": self.revision}
        settings = {"temperature": 0.0, "max_tokens": self.max_tokens}
        return {**about, **settings, "prompt_sha256": JUDGE_PROMPT_SHA256}


@dataclass(frozen=True, slots=True)
class RunConfig:
    """One run of some benchmarks against one endpoint.

    repeats      None: each benchmark's own
    concurrency  requests in flight; None: each benchmark's own
    retries      further tries after a fault of the server; then the attempt is listed as missing
    partial      print scores although attempts are missing
    allow_missing  benchmarks whose data is not at hand are recorded as not measured
    seed_shift     another number draws other seeds for everything; a baseline against itself (A/A)
                   and fresh repeats need that
    """

    out: Path
    arm: str
    benchmarks: tuple[Benchmark, ...]
    sampling: RunSampling = field(default_factory=RunSampling)
    options: Options = field(default_factory=Options)
    repeats: int | None = None
    concurrency: int | None = None
    retries: int = 6
    timeout_s: float = 3_600.0
    judge: JudgeConfig | None = None
    code_python: str | None = None
    code_limits: SandboxLimits = field(default_factory=SandboxLimits)
    partial: bool = False
    allow_missing: bool = False
    api_key: str = "none"
    seed_shift: int = 0

    def sampling_for(self, benchmark: Benchmark) -> RunSampling:
        """The sampling of one benchmark's requests, which may know one effort only."""
        if benchmark.effort is None or self.sampling.reasoning_effort is None:
            return self.sampling
        return replace(self.sampling, reasoning_effort=benchmark.effort)

    def settings(self) -> dict[str, Any]:
        """What decides the requests and must be equal for resuming and for comparing."""
        options = asdict(self.options)
        # Where the data lies is no setting: its hashes are in each result.
        del options["data"]
        # Runs from before items were generated have no such settings, and need none.
        for name, unset in (("items", None), ("item_seed", 0)):
            if options[name] == unset:
                del options[name]
        settings = {**asdict(self.sampling), **options, "repeats": self.repeats}
        # Runs from before there was a shift have none in their settings, and none was theirs.
        return settings | ({"seed_shift": self.seed_shift} if self.seed_shift else {})


def seed_for(benchmark: str, item_id: str, repeat: int, shift: int = 0) -> int:
    """The seed of one attempt: different for every repeat, the same in both arms.

    shift  `RunConfig.seed_shift`: no seed of one shift is meant to occur with another
    Example: ``seed_for("quick", "quick-01", 0)`` is the same number on every machine.
    """
    name = f"{benchmark}/{item_id}/{repeat}" + (f"/{shift}" if shift else "")
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "big") & 0x7FFFFFFF


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Names of settings that are not equal, with both values."""
    names = sorted({*one, *other})
    return [
        f"{n}: {one.get(n)!r} and {other.get(n)!r}" for n in names if one.get(n) != other.get(n)
    ]


def differing_judges(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """`differing` for two judges: where a judge is served makes no other judge of it."""
    return differing(*({k: v for k, v in judge.items() if k != "url"} for judge in (one, other)))
