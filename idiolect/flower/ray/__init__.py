"""The simulation engine on a cluster of Ray."""
