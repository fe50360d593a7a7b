"""Shared parts of the formats of control networks."""
