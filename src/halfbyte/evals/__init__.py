"""Measure quality over the wire: benchmarks, graders, paired statistics."""
