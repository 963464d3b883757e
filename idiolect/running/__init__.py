"""From a model and clients to a finished run."""
