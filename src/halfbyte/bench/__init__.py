"""Speed records: what was measured, how, on which machine."""
