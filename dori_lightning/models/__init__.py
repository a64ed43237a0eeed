"""Load text-to-image models safely, behind the one protocol that the rest of the code sees."""
