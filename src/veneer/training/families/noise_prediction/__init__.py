"""Families of denoisers that predict the noise or v: UNets and the transformers before flow matching."""
