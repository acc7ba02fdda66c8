"""Benchmarks: each measures the system from outside and prints its yardstick, taken in the same run, beside it."""
