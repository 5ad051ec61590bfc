"""The pool as seen by an API process: workers, models and metrics."""
