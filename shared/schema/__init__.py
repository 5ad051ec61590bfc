"""What crosses HTTP, Redis and process borders, as closed named types."""
