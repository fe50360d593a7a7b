"""Checks of training photos for blur, exposure, near duplicates and what the crop keeps; they measure and change nothing."""
