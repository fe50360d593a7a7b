"""Shared parts of all formats: the base class, LoRA layouts, attaching, conversion and inspection."""
