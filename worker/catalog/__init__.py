"""The catalog of a worker: scanning the models directory, reading headers, naming models."""
