"""Bytes of strangers, read strictly."""
