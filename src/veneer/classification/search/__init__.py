"""Search over combinations of methods, blocks and sizes under a parameter budget."""
