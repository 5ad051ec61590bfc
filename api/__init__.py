"""The HTTP edge: decodes requests, hands loads to workers, follows them."""
