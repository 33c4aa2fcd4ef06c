"""OpenSora: trains and samples video diffusion transformers. Importing the package imports nothing else."""

__version__ = "0.1.0"
