"""What a node runs on, handed in from outside: device, network, loop."""
