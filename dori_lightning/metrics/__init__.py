"""Compare generated images with references, and decide what counts as a copy."""
