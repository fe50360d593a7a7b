"""Adapters with a down- and an up-projection, at the end of a residual branch or beside it."""
