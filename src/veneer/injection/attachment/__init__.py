"""Attaching an adapter to a model, its state, and detaching it without a trace."""
