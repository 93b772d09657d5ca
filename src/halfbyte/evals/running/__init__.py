"""Ask the items of a benchmark, grade and record the answers."""
