"""Files and names: reading, writing and checking checkpoints in every dialect."""
