"""Methods that add modules beside or between the layers of the base model."""
