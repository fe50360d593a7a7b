"""Several data sets in one run: one model with a head for each task, sampled batch by batch."""
