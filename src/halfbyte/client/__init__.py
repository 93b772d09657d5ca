"""A client of any OpenAI-compatible server, and `halfbyte chat` over it."""
