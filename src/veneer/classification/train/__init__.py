"""Training of classifiers: batches, epoch selection, hyperparameter search and comparisons."""
