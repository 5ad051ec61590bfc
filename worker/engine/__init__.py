"""The engine.  Runs in runner processes only; no module outside this package imports it."""
