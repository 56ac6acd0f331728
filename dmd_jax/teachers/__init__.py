"""Families of teachers, one file each; `teacher` has their type."""
