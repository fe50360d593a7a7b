"""Adapters of the image features and the classifier of a CLIP model."""
