"""Code that the API, the workers and the command line share."""

__version__ = "0.1.0"
