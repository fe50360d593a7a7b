"""The page Control: generate from a sketch, map or image, and train control adapters."""
