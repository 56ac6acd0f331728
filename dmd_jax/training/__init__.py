"""The state, the step, and the loop that drives it."""
