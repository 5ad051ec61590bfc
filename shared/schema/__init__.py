"""The types that are exchanged over HTTP, through Redis and between processes."""
