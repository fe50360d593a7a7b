"""Methods that change the pixels of the input image, and map labels."""
