"""Families of diffusion transformers that generate video."""
