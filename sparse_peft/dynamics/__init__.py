"""What the methods share in training: the protocol of dynamics, records, optimizer state, processes."""
