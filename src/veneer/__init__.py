"""Thin trained layers on frozen vision and diffusion models."""
