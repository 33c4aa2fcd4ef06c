"""Open-Sora's module of training helpers; they live in `opensora.training`."""

from opensora.training.masks import MaskGenerator

__all__ = ["MaskGenerator"]
