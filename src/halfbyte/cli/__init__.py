"""Commands; each is a dozen lines that import their hall when run."""
