"""Pure graders: a sample and an answer text in, a score out; no network, no harness."""
