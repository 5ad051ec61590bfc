"""Redis: the keys, the scripts that change several of them at once, and the objects that read and write them."""
