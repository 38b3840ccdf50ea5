"""C3PO++: token-budgeted rollouts for Megatron."""
