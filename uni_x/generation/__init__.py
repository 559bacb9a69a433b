"""Generation: sampling, guidance, and the engine that answers batches of requests."""
