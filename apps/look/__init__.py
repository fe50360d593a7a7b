"""Look of the app: theme, style sheet and scripts."""
