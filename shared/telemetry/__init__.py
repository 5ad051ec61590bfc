"""Logging, tracing and counters of all processes."""
