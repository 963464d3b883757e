"""A site: one client, its data and its personal state."""
