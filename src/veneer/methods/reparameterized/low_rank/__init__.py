"""Updates of a weight by factors of low rank."""
