"""Methods that train the class prompts of a CLIP."""
