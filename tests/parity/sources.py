"""Where the clones are."""

SOURCES = "VENEER_PARITY_SOURCES"
"""Environment variable with the folder of clones, `OWNER+NAME` each, with or without a work tree."""
