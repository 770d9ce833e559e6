"""From logs to batches: readers, the dataset on disk, order, sampling, and the loader."""
