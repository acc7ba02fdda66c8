"""A compute node: takes batches through its slices, and speaks to memory nodes and other compute nodes."""
