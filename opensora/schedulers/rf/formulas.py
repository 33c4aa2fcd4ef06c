"""The formulas of rectified flow, shared by its loss and its sampler.

Liu et al., "Flow Straight and Fast" (2022), arXiv:2209.03003. Convention: time t runs from 0 (data) to `num_timesteps`
(noise); with tau = t / num_timesteps, x_t = (1 - tau) x_0 + tau noise, and the velocity points from noise to data.

Shapes: B samples, C channels, T latent frames, H x W latent pixels; times are [B].
"""

from __future__ import annotations

import torch
from torch import Tensor

REFERENCE_AREA = 512 * 512
"""Pixels of the clip, one latent frame long, for which the shift of times is neutral."""


def per_frame(times: Tensor) -> Tensor:
    """[B] or [B, T] → a shape that multiplies [B, C, T, H, W]."""
    return times.reshape(times.shape[0], 1, -1, 1, 1)


def interpolate(x0: Tensor, noise: Tensor, tau: Tensor) -> Tensor:
    """The point at `tau` ([B] or [B, T], 0 to 1) of the straight path from `x0` (tau 0) to `noise` (tau 1)."""
    tau = per_frame(tau)
    return (1 - tau) * x0 + tau * noise


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """What the model predicts: the direction from noise to data, the same along the whole path."""
    return x0 - noise


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans, 2022, arXiv:2207.12598)."""
    return unconditional + scale * (conditional - unconditional)


def shift_ratio(height: Tensor, width: Tensor, *, num_latent_frames: int, scale: float) -> Tensor:
    """How much more noise a clip needs than a 512 x 512 image: the root of its relative size, times `scale`. [B]"""
    area = height.double() * width.double() / REFERENCE_AREA
    return scale * torch.sqrt(area * num_latent_frames)


def shift(tau: Tensor, ratio: Tensor) -> Tensor:
    """Move times towards noise: 0 and 1 stay, the odds tau / (1 - tau) are multiplied by `ratio`."""
    return (ratio * tau / (1 + (ratio - 1) * tau)).clamp(0, 1)


def logit_normal_quantile(u: Tensor, *, loc: float, scale: float) -> Tensor:
    """The inverse of the logit-normal distribution function: u in (0, 1) → (0, 1)."""
    return torch.sigmoid(loc + scale * torch.special.ndtri(u))


def mean_over_frames(error: Tensor, mask: Tensor | None) -> Tensor:
    """[B, C, T, H, W] → [B]: the mean, with a mask ([B, T]) over its frames only.

    A sample whose mask has no frame gets 0.
    """
    if mask is None:
        return error.flatten(1).mean(1)
    frames = error.mean(dim=(1, 3, 4))
    weights = mask.to(frames.dtype)
    return (frames * weights).sum(1) / weights.sum(1).clamp(min=1)
