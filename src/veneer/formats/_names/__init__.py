"""Module names in other tools' files, and their paths in diffusers models."""
