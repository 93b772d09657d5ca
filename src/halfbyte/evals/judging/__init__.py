"""Records in, verdicts out: errors, comparisons, plans."""
