"""What serves a cluster over HTTP."""
