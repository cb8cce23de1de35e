"""What only Dynamic Network Rewiring needs."""
