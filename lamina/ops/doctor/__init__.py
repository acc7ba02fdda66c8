"""``lamina doctor``: what a cluster needs and whether it is there, before the first run or beside a running one.

``machine`` looks at this machine, ``cluster`` at the nodes of a file and the ways between them, and ``report`` prints
both. Nothing here raises: what cannot be found out is a line like any other.
"""
