"""Whether memorization sits in one place: many embeddings that draw one image, compared."""
