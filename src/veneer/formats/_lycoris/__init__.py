"""Codecs of the methods of LyCORIS."""
