"""The wire: an OpenAI-compatible HTTP server over the engine."""
