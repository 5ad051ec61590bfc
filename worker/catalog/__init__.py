"""The models on a disk of a worker: scanned, read, named."""
