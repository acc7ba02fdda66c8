"""Constrained output: which tokens may come next in an answer that has to fit a schema, a text or a grammar."""
