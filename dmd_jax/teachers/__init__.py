"""Families of teachers, one file each; `teacher` has their type, `families` knows them all."""
