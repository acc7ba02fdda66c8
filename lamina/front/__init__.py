"""The front: which requests run, what each step consists of, and what clients are answered."""
