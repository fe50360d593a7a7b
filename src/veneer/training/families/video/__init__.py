"""Families of video models, which train on images as videos of one frame."""
