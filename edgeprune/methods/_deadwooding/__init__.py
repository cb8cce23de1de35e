"""What only Deadwooding needs."""
