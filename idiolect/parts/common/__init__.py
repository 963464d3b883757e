"""Helpers that two or more parts share."""
