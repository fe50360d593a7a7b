"""Methods that train whole tensors: weights, biases, norms, the head."""
