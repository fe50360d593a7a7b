"""Checks and estimates of a run before it starts."""
