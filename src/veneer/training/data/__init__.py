"""Training images: reading, captions, buckets, class images, and caches of latents and text embeddings."""
