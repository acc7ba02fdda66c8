"""A memory node holds the KV caches of tenants and attends over them."""
