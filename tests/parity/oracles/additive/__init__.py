"""Oracles of additive methods."""
