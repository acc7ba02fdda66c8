"""This package has the backend for CUDA devices, over FlashInfer's kernels."""
