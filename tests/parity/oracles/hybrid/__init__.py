"""Oracles of hybrid methods."""
