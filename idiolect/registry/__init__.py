"""Names and expressions in settings, and the objects that they stand for."""
