"""The two daemons: ``compute`` runs the slices and talks to clients, ``memory`` holds KV caches and attends."""
