"""The engine: runs in runner processes only.  Nothing outside this package imports it."""
