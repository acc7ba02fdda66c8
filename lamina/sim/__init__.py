"""A whole cluster in one process on a virtual clock: no sockets, no threads, no waiting, the same in every run."""
