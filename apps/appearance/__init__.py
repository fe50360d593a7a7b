"""Appearance of the app: theme, styles and scripts."""
