"""Weights of other projects in, and out."""
