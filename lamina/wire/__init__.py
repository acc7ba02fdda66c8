"""Nodes talk to each other in these types and bytes, one module per conversation. There is no task, thread or socket
here."""
