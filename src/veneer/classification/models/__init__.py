"""Image classifiers: timm models with a new head, and CLIP with class texts as its head."""
