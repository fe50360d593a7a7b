"""Control maps computed from an image without a neural network."""
