"""The HTTP endpoint: a process of its own before the front, which it reaches as every client does.

It never imports torch. `run` begins and ends it, `app` has the table of endpoints, each endpoint is a module, and
`generate` runs what they ask for. `local` starts a whole cluster for one checkpoint.
"""
