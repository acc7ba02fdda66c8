"""There are two daemons: ``compute`` runs the slices and serves clients, ``memory`` holds KV caches and attends."""
