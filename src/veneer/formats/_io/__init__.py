"""Guarded reading and atomic writing of files."""
