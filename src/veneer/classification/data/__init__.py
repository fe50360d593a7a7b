"""Labeled images: sources, checks, splits, transforms and the loader."""
