"""Oracles of reparameterized methods."""
