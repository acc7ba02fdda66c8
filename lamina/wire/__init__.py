"""What nodes say to each other, as types and bytes, one module per conversation. No task, no thread, no socket."""
