"""Figures of an engine, as metrics and people want them. No torch."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Figures of an engine: what it holds now, and totals since it was loaded.

    free_blocks holds the cached_blocks, which nobody uses but whose content can be found again.
    step_s is the time spent in steps. proposed_tokens were guessed and checked (speculation),
    accepted_tokens of them stood; both are 0 without speculation. saturation says of each kind of
    linear and of "text" or "image" rows how many activations were clipped, of how many; empty
    unless the engine counts them.
    """

    running: int
    waiting: int
    total_blocks: int
    free_blocks: int
    cached_blocks: int
    block_tokens: int
    weight_bytes: int
    cache_bytes: int
    requests: int
    steps: int
    step_s: float
    preemptions: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    proposed_tokens: int
    accepted_tokens: int
    saturation: tuple[tuple[str, str, int, int], ...] = ()
