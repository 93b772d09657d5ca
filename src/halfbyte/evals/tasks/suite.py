"""All benchmarks by name, and the suites that a user may ask for."""

from collections.abc import Sequence

from halfbyte.errors import UsageError
from halfbyte.evals.tasks import aa_lcr, aime, gpqa, ifbench, mmlu_pro, mmmu_pro, pocket, scicode
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
        pocket.BENCHMARK,
    )
}

# The order of the published table's columns.
SUITES: dict[str, tuple[str, ...]] = {
    "seed": ("mmlu_pro", "gpqa_diamond", "aa_lcr", "scicode", "aime2025", "ifbench", "mmmu_pro"),
}


def find_benchmarks(names: Sequence[str]) -> tuple[Benchmark, ...]:
    """Benchmarks for names of benchmarks and suites, each once, in order."""
    found: dict[str, Benchmark] = {}
    for name in names:
        for member in SUITES.get(name, (name,)):
            if member not in BENCHMARKS:
                known = ", ".join([*SUITES, *BENCHMARKS])
                raise UsageError(f"no benchmark or suite {name!r}; there are: {known}")
            found[member] = BENCHMARKS[member]
    return tuple(found.values())
