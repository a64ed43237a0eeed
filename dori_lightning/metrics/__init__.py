"""Compare generated pictures with references, and decide what counts as a copy."""
