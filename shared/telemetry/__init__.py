"""Logs, traces and counts of every process."""
