"""The command line: parser, groups of flags, and examples."""
