"""Networks of points in the plane."""
