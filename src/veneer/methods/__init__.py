"""Methods: one module per method, grouped as in the survey."""
