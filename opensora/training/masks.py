"""Frame-conditioning masks of training: which latent frames are given clean, and which are to be predicted.

The names and what they do are Open-Sora's. True is a frame to predict, False a frame that is given.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from opensora.errors import ConfigError


class MaskGenerator:
    """Draws a mask per sample, each kind with its share.

    Args:
        mask_ratios: name of a mask → its share of the samples; what is missing to 1 is `identity` (nothing given).

    Raises:
        ConfigError: an unknown name, a share outside 0 to 1, or shares that do not add up to 1.
    """

    def __init__(self, mask_ratios: Mapping[str, float]) -> None:
        for name, ratio in mask_ratios.items():
            if name not in MASKS:
                raise ConfigError(f"mask_ratios.{name}: unknown mask", hint=f"known: {', '.join(MASKS)}")
            if not 0 <= ratio <= 1:
                raise ConfigError(f"mask_ratios.{name}={ratio} is not within 0 and 1", hint="use a share")
        total = sum(mask_ratios.values())
        if not total <= 1 + 1e-6 or ("identity" in mask_ratios and not math.isclose(total, 1, abs_tol=1e-6)):
            raise ConfigError(
                f"mask_ratios add up to {total:g}", hint="make it 1, or leave `identity` out and stay below 1"
            )
        self.mask_ratios = dict(mask_ratios)
        self.mask_ratios.setdefault("identity", 1 - total)

    def mask_for(self, num_frames: int, rng: np.random.Generator) -> list[bool]:
        """The mask of one sample with `num_frames` latent frames. At least one frame is to be predicted."""
        if num_frames <= 1:
            return [True] * num_frames
        draw = rng.random()
        cumulated = 0.0
        name = next(reversed(self.mask_ratios))
        for candidate, ratio in self.mask_ratios.items():
            cumulated += ratio
            if draw < cumulated:
                name = candidate
                break
        return [bool(frame) for frame in MASKS[name](num_frames, rng)]

    def get_mask(self, x: Tensor) -> Tensor:
        """One mask, bool [T], for latents [B, C, T, H, W]; Python's `random` is its seed."""
        generator = np.random.default_rng(random.getrandbits(64))
        return torch.tensor(self.mask_for(x.shape[2], generator), dtype=torch.bool, device=x.device)

    def get_masks(self, x: Tensor) -> Tensor:
        """A mask per sample, bool [B, T], for latents [B, C, T, H, W]; Python's `random` is their seed."""
        return torch.stack([self.get_mask(x) for _ in range(len(x))])


def _given(num_frames: int, *, head: int = 0, tail: int = 0) -> np.ndarray:
    """The first `head` and last `tail` frames are given; the tail yields where nothing would be left to predict."""
    mask = np.ones(num_frames, dtype=bool)
    if head + tail < num_frames:
        mask[num_frames - tail :] = False
    mask[:head] = False
    return mask


def _anywhere(num_frames: int, length: int, rng: np.random.Generator) -> np.ndarray:
    start = int(rng.integers(0, num_frames - length, endpoint=True))
    mask = np.ones(num_frames, dtype=bool)
    mask[start : start + length] = False
    return mask


def _quarter(num_frames: int, rng: np.random.Generator) -> int:
    """A length from 1 to a quarter of the frames; 1 where a quarter is less than a frame."""
    return int(rng.integers(1, max(num_frames // 4, 1), endpoint=True))


def _quarter_head_tail(num_frames: int, rng: np.random.Generator) -> np.ndarray:
    length = _quarter(num_frames, rng)
    return _given(num_frames, head=length, tail=length)


def _every_second(num_frames: int, rng: np.random.Generator) -> np.ndarray:
    mask = np.ones(num_frames, dtype=bool)
    mask[int(rng.integers(0, 1, endpoint=True)) :: 2] = False
    return mask


def _scattered(num_frames: int, rng: np.random.Generator) -> np.ndarray:
    mask: np.ndarray = rng.random(num_frames) > rng.uniform(0.1, 0.9)
    if not mask.any():
        mask[-1] = True
    return mask


MASKS: dict[str, Callable[[int, np.random.Generator], np.ndarray]] = {
    "identity": lambda n, _: np.ones(n, dtype=bool),
    "quarter_random": lambda n, rng: _anywhere(n, _quarter(n, rng), rng),
    "quarter_head": lambda n, rng: _given(n, head=_quarter(n, rng)),
    "quarter_tail": lambda n, rng: _given(n, tail=_quarter(n, rng)),
    "quarter_head_tail": _quarter_head_tail,
    "image_random": lambda n, rng: _anywhere(n, 1, rng),
    "image_head": lambda n, _: _given(n, head=1),
    "image_tail": lambda n, _: _given(n, tail=1),
    "image_head_tail": lambda n, _: _given(n, head=1, tail=1),
    "random": _scattered,
    "intepolate": _every_second,
}
"""Name → function of (latent frames, at least 2; generator)."""
