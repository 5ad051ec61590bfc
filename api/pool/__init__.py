"""The cluster as an API process sees it: its workers, its models, its metrics."""
