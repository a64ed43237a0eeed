"""Read, check and serve pairs: a prompt and the image it may reproduce."""
