"""GGUF files with random weights, for the demo, tests and benchmarks."""
