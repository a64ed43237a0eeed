"""Read, check and serve pairs: a prompt and the picture it may reproduce."""
