"""The memory of the devices that a worker owns: readings, reservations, placement."""
