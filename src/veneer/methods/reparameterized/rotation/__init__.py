"""Orthogonal updates, which rotate the output or the input of a layer."""
