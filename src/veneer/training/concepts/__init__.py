"""Concepts of a run: trigger tokens, and for each its metrics, verdict and images."""
