"""Methods that add vectors to features, or multiply features by vectors."""
