"""Single-label and multi-label classification: targets, loss, metrics, plots and predictions."""
