"""Methods that combine several of the other groups; none yet."""
