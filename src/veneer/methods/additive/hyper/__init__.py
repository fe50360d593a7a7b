"""Adapters whose parameters a hypernetwork generates from embeddings of the task, the layer and the position."""
