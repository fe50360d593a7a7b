"""Adapters that add an image to the inputs of a diffusion model: control maps and image prompts."""
