"""Compare generated pictures with originals, and decide what counts as a copy."""
