"""Oracles of selective methods."""
