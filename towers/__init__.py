"""Neural building blocks of the three heads: tensors in, tensors out; no loss, nothing of the program."""
