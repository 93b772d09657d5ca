"""All benchmarks by name, and the suites that a user may ask for."""

from collections.abc import Sequence
from dataclasses import replace

from halfbyte.errors import UsageError
from halfbyte.evals.tasks import (
    aa_lcr,
    aime,
    bfcl,
    gpqa,
    ifbench,
    mmlu_pro,
    mmmu_pro,
    pocket,
    quick,
    scicode,
)
from halfbyte.evals.tasks.benchmark import Benchmark

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        mmlu_pro.BENCHMARK,
        gpqa.BENCHMARK,
        aa_lcr.BENCHMARK,
        scicode.BENCHMARK,
        aime.BENCHMARK,
        ifbench.BENCHMARK,
        *mmmu_pro.BENCHMARKS,
        *bfcl.BENCHMARKS,
        quick.BENCHMARK,
        *pocket.BENCHMARKS,
    )
}

# Names that a benchmark no longer has, and what to say of them.
RENAMED = {"pocket": "the 40 small questions that were once called 'pocket' are 'quick'"}

# The order of the published table's columns.
SUITES: dict[str, tuple[str, ...]] = {
    "seed": ("mmlu_pro", "gpqa_diamond", "aa_lcr", "scicode", "aime2025", "ifbench", "mmmu_pro"),
    # Each kind of item in the place of the benchmark that it stands for.
    "pocket": tuple(benchmark.name for benchmark in pocket.BENCHMARKS),
}

# The same benchmarks asked so often that equal arms end GO as a whole at least four times out of
# five, by the planning values; the cost is several times that of the defaults (`evaluate plan`).
SUITES["decide"] = SUITES["seed"]
REPEATS: dict[str, dict[str, int]] = {
    "decide": {
        "mmlu_pro": 2,
        "gpqa_diamond": 96,
        "aa_lcr": 160,
        "scicode": 44,
        "aime2025": 192,
        "ifbench": 80,
        "mmmu_pro": 8,
    }
}


def find_benchmarks(names: Sequence[str], items: int | None = None) -> tuple[Benchmark, ...]:
    """Benchmarks for names of benchmarks and suites, each once, in order.

    A suite may ask its benchmarks more often than they would be by themselves (`REPEATS`).
    items  how many a generated benchmark has; None: its own number
    """
    found: dict[str, Benchmark] = {}
    for name in names:
        for member in SUITES.get(name, (name,)):
            if member not in BENCHMARKS:
                there = ", ".join([*SUITES, *BENCHMARKS])
                raise UsageError(f"there is no benchmark or suite {name!r}; there are: {there}")
            repeats = REPEATS.get(name, {}).get(member, BENCHMARKS[member].repeats)
            known = replace(BENCHMARKS[member], repeats=repeats)
            if known.is_generated and items is not None:
                known = replace(known, full_items=items)
            found.setdefault(member, known)
    return tuple(found.values())
