"""Client memories, checkpoints and run directories."""
