"""Weights as chains of tensors."""
