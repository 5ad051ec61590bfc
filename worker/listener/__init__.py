"""The listener: the process that accepts channels and hands each to its runner."""
