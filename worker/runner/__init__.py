"""The parent side of a runner: the process, its messages, its output, its failure."""
