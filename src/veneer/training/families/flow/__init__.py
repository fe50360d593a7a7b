"""Families of flow-matching transformers of images."""
