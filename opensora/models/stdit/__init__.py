"""Spatial-temporal diffusion transformers."""
