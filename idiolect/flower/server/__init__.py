"""The server that sites join: its processes, keys and network."""
