"""Lamina: large-language-model decoding, split at attention."""

__version__ = "0.1.0"
