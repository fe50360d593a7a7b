"""Methods that train attention heads, channels or special tokens."""
