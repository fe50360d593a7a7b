"""Codecs of the methods of peft."""
