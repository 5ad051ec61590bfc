"""The channel between an API process and a runner: its messages."""
