"""The page that trains a subject or style from a few photos."""
