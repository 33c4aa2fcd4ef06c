"""Typed settings of a run and how they are read. Torch-free; importing the package imports nothing else."""
