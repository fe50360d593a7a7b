"""Methods that train, or mask, selected entries of weights."""
