"""Text encoders: captions to token embeddings."""
