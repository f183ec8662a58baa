"""Models with absolute positions: the context is re-encoded when it is full."""
