"""vLLM behind this server's API: its command line, and what it answers."""
