"""Diffusion models, video autoencoders and text encoders. Each runs alone on one CPU; nothing here is distributed."""
