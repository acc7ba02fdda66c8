"""The HTTP server, and offline batches of the same requests."""
