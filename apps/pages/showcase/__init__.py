"""First screen: what the app does, in images, with one click to try each task."""
