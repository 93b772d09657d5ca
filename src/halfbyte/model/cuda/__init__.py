"""The decoder on one Hopper GPU: weights in streaming order, decode steps, prefill."""
