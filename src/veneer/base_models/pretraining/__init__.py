"""Training of the bundled base models: autoencoder, CLIP, and denoiser with its text encoder."""
