"""Mesh, shardings and processes."""
