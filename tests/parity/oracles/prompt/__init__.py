"""Oracles of prompt methods."""
