"""Memory requirements and placement of loads: pure functions, used by the API and by the workers."""
