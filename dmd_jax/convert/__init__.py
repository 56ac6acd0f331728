"""Weights of other projects, read with NumPy and never executed."""
