"""What several tests build: a tiny checkpoint with random weights, in the format of a real one."""
