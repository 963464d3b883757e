"""This machine: processes, private folders and lock files."""
