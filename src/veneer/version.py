"""The version of veneer."""

__version__ = "0.1.0"
