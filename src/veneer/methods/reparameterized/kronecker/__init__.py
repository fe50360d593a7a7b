"""Updates of a weight by Kronecker and Hadamard products."""
