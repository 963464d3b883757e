"""One round: a client's training, the server's aggregation, and what both are made from."""
