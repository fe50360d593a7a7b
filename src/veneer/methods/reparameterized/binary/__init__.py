"""Weight updates and adapters with matrices of one bit per entry."""
