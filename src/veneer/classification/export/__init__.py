"""Export of trained classifiers to formats that other tools load without veneer."""
