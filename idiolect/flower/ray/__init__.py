"""Flower's simulation engine: clients are trained by actors on a Ray cluster."""
