"""Small attention modules beside or after the host's attention."""
