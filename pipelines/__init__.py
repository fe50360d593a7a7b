"""The commands: one runnable module each, a config and a function."""
