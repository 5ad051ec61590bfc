"""The parent side of a runner: process, messages, output, failures."""
