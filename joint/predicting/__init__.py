"""What a finished run says of a dataset: logits and lists, made and written."""
