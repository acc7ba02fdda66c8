"""The front decides which requests run and what each step consists of, and answers clients."""
