"""Seams: the hooks, parametrizations and attention processors that connect adapters to host modules."""
