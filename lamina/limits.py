"""The cluster file and the messages between nodes share these bounds."""

MAX_COMPUTE = 32
"""The most compute nodes of one cluster."""
MAX_BATCHES = 32
"""The most batches in flight."""
MAX_BATCH = 4096
"""The most sequences of one batch."""
MAX_PREFILL_TOKENS = 65536
"""The most prompt tokens that go through the slices together with one step of a batch."""
MAX_REMOTE_TOKENS = 256
"""The most prompt tokens of one step whose past lies on memory nodes."""
MAX_STEP_TOKENS = MAX_BATCH + MAX_REMOTE_TOKENS + MAX_PREFILL_TOKENS
"""The most tokens of one step: decoding sequences and both kinds of prompt tokens."""
MAX_BYTES = 2**60
"""The largest size that a file or message may name, far beyond the memory of any machine."""
MAX_LEASE = 3600
"""The most seconds for which what belongs to a lost node may be kept."""
MAX_MOVED = 512
"""The most parts of one sequence that may lie elsewhere than by the rule of its placement."""
