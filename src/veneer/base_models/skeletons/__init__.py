"""Module trees of published models, stored with the package, and modules on the meta device built from them with torch alone."""
