"""Text and images to tokens and back; no torch, no engine."""
