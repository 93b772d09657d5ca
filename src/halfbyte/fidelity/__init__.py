"""How close one checkpoint comes to another: perplexity, divergence, answers that change."""
