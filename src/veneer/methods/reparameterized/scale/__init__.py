"""Updates that scale the features or the singular values of a layer."""
