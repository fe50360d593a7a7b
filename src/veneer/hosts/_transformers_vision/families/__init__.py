"""One module with the record of each family."""
