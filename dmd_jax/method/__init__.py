"""The method's mathematics, as pure functions of arrays."""
