"""Side networks, which read the blocks of the base model and are trained without a backward pass through it."""
