"""Training shared by all commands: data, objective, loop, preflight checks and report."""
