"""What people see of a run: metrics, pictures, charts, profiles, a report."""
