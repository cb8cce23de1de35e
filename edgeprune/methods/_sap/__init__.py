"""What only Sparsity-informed Adaptive Pruning needs."""
