"""Train a small Stable Diffusion that really memorizes a given list of images."""
