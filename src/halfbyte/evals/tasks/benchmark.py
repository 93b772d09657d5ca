"""What a benchmark is to the rest: names, defaults, and its three functions."""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from halfbyte.evals.tasks.data import Provenance
from halfbyte.evals.types import Conversation, Prompt, Reply, Sample, Score

# answer: graded from its text alone. judged: a model grades it. code: a program is run.
# tools: a conversation with tools, whose calls are graded.
Kind = Literal["answer", "judged", "code", "tools"]

# What is asked, step by step: it yields a conversation, is sent what the model said, and in the end
# returns the answer that is stored and graded.
Steps = Generator[Conversation, Reply, str]


@dataclass(frozen=True, slots=True)
class Options:
    """Choices of a run that change prompts or items; all are part of the record.

    limit   at most so many items (problems, where a problem is a trajectory), spread evenly
    items, item_seed  of generated benchmarks: how many items are made (None: the benchmark's own
                      number) and from which seed
    """

    data: Path | None = None
    limit: int | None = None
    skip_unscorable: bool = False
    code_background: bool = True
    gpqa_seed: int = 42
    mmlu_prompt: Literal["aa", "aa-boxed"] = "aa-boxed"
    image_placement: Literal["inline", "append"] = "inline"
    items: int | None = None
    item_seed: int = 0


@dataclass(frozen=True, slots=True)
class LoadedItems:
    """Samples in the benchmark's own order, and where they came from."""

    samples: tuple[Sample, ...]
    provenance: Provenance
    left_out: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One benchmark: how its items are loaded, asked and graded.

    load      options -> samples
    prompt    a sample and the model's answers to the earlier samples of its group (only where
              `is_trajectory`) -> one user message
    grade     a sample and the final answer -> score; for `answer` and `tools` kinds
    converse  for `tools` kinds: the steps of an item, of which `prompt` is the first
    repeats   by default; `margin` the largest loss still called no regression, in scores (0.01)
    needs_algebra  whether some answers can only be compared by math-verify
    effort  the one reasoning effort at which its items make sense; None: the run's
    is_generated  whether items are made from a seed, as many as one likes
    plan_*    planning values: variance is the mean p(1-p) of an item's answers for a strong
              reasoning model; of groups their number, and the factor by which shared luck widens
              the standard error (simulated, to be replaced by a pilot's)
    """

    name: str
    title: str
    kind: Kind
    load: Callable[[Options], LoadedItems]
    prompt: Callable[[Sample, Sequence[str], Options], Prompt]
    grade: Callable[[Sample, str], Score] | None
    prompt_id: str
    scorer: str
    source: str
    licence: str
    full_items: int
    repeats: int
    margin: float
    plan_variance: float
    plan_prompt_tokens: int
    plan_output_tokens: int
    plan_groups: int | None = None
    plan_design: float = 1.0
    has_groups: bool = False
    is_trajectory: bool = False
    concurrency: int = 64
    notes: Sequence[str] = ()
    needs_algebra: bool = False
    effort: str | None = None
    is_generated: bool = False
    converse: Callable[[Sample, Options], Steps] | None = None


def spread_indices(count: int, limit: int | None) -> list[int]:
    """Indices of at most `limit` of `count` items, evenly spaced: files are sorted by subject."""
    if limit is None or limit >= count:
        return list(range(count))
    return [index * count // limit for index in range(limit)]
