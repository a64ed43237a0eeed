"""Certify: every way into a model, and the work that it takes."""
