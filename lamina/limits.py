"""The bounds that the cluster file and the messages between nodes share."""

MAX_COMPUTE = 32
"""Compute nodes of one cluster."""
MAX_BATCHES = 32
"""Batches in flight."""
MAX_BATCH = 4096
"""Sequences of one batch."""
MAX_PREFILL_TOKENS = 65536
"""Prompt tokens that go through the slices together with one step of a batch."""
MAX_REMOTE_TOKENS = 256
"""Prompt tokens of one step whose past lies on memory nodes."""
MAX_STEP_TOKENS = MAX_BATCH + MAX_REMOTE_TOKENS + MAX_PREFILL_TOKENS
"""Tokens of one step: decoding sequences and both kinds of prompt tokens."""
MAX_BYTES = 2**60
"""What a size may say, far beyond the memory of any machine."""
