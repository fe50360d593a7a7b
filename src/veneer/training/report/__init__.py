"""What a run writes: progress, previews, metrics, image grids, verdict and files."""
