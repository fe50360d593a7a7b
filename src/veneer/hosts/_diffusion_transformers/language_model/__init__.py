"""Records of transformers of images that read the tokens of a language model, beside those in `image`."""
