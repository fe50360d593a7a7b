"""Tensor functions that several methods share, without modules."""
