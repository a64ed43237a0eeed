"""Search the text embeddings that make a model reproduce given images."""
