"""One round: a client's local training, the server's aggregation, and their inputs."""
