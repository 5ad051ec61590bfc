"""Loads as clients see them: accepted, followed, streamed, stopped."""
