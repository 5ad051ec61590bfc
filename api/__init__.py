"""The HTTP API: decodes requests, assigns loads to workers, and follows the loads."""
