"""Updates of a weight by block-diagonal matrices."""
