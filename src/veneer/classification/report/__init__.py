"""Results of a classification run: metrics, plots, verdict and files."""
