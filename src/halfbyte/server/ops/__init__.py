"""Watching the server: counters, traces, what the process holds, an engine that is restarted."""
