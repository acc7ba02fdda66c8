"""All nodes of a cluster file as processes of this machine."""
