"""Families of flow-matching transformers of images that read the tokens of a language model, beside those in `flow`."""
