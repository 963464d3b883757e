"""The server's processes, keys and network."""
