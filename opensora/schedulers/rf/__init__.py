"""Rectified flow: the loss and the sampler of `type="rflow"`."""

from opensora.schedulers.rf.rectified_flow import RFLOW

__all__ = ["RFLOW"]
