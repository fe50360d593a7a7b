"""Several attachments on one model: activation, merging, swapping and mixed batches."""
