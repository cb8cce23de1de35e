"""What only the data-free method needs."""
