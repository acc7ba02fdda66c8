"""``lamina doctor``: checks of what a cluster needs, before its first run or while it runs.

``machine`` checks this machine, ``cluster`` the nodes of a file and the links between them, and ``report`` prints both.
No check raises an error: what cannot be determined is a finding like any other.
"""
