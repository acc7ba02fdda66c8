"""A node runs on a device, a network and a loop that are handed in from outside."""
