"""What an operator asks of a cluster: diagnosis, traces, figures."""
