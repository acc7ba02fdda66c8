"""Chats: what a client says becomes a prompt, and what the model says becomes messages. There is no socket here."""
