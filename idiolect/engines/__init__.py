"""Engines: how the clients of a round are trained and evaluated; and the federation in one process."""
