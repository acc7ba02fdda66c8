"""A compute node takes batches through its slices, and exchanges data with memory nodes and other compute nodes."""
