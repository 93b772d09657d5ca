"""Pocket: a small Mistral3 model trained from scratch on generated data. See README.md."""
