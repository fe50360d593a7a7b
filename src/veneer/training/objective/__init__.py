"""Objectives of diffusion training: noise, timestep sampling, prediction targets, losses and their weighting."""
