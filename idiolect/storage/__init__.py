"""Where client memories, checkpoints and run directories are kept."""
