"""Families of diffusion transformers that generate images."""
