"""Textbook loops that share no code with what they check; a module for each family of methods."""
