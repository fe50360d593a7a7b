"""Benchmarks of `veneer bench`: interleaved timings of veneer, peft and diffusers, reported as ratios. One module per row."""
