"""The page Generate: images from a prompt with any number of adapters."""
