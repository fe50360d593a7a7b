"""Adapters of domains, on which adapters of tasks are stacked."""
