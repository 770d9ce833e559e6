"""A user's own flat log, one row per (request, item) -> a dataset."""
