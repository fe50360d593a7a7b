"""What a personalization run evaluates: how many images, and by which feature model."""
