"""Adapters that attend: to prompts, or with small heads beside those of the base model."""
