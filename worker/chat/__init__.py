"""Chat templates and parsers.  They run in a process of their own, the helper of a runner."""
