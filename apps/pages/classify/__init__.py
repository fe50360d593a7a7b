"""The page Classify: train a classifier and classify images."""
