"""Methods that train a selection of the base parameters."""
