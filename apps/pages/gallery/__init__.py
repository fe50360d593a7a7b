"""The page Gallery: generated images and results of training."""
