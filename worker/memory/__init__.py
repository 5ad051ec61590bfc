"""The memory of a worker's devices: readings, reservations, placement."""
