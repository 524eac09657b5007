"""moduli: modular transformers, end to end."""
