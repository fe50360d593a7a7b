"""Methods that train a structured delta or transform of the weights, which can be merged."""
