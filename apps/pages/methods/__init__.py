"""The page Methods: the catalog of all methods."""
