"""Diffusion processes: each one's loss and sampler are built on one set of formulas."""
