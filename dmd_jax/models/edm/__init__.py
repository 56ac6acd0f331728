"""EDM's networks."""
