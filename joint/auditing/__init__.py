"""The audit of a dataset: leakage checks, counts, distances between spaces, and a page of them."""
