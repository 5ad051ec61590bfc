"""What the API and the workers have in common."""

__version__ = "0.1.0"
