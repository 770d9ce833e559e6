"""The public RecFlow release -> a dataset."""
