"""The page Adapters: inspect, convert, merge and resize adapter files."""
