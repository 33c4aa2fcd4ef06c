"""What a clip costs to train on, from its shape alone: floating-point operations of STDiT3.

Feeds the balancing of steps and the reported utilisation. Measured times never enter a plan, or it would differ between
machines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from opensora.config.components import STDiT3Config
from opensora.datasets.bucket import BucketShape

_CHUNK_FRAMES, _CHUNK_LATENTS = 17, 5
_TIME_FACTOR, _SPACE_FACTOR = 4, 8
_PUBLISHED_TEXT_TOKENS = 300


def latent_size(num_frames: int, height: int, width: int) -> tuple[int, int, int]:
    """(T, H, W) of a clip's latent, for the codec and Open-Sora's VAE 1.2: 17 frames give 5, 8 x 8 pixels give 1."""
    chunks, rest = divmod(num_frames, _CHUNK_FRAMES)
    frames = chunks * _CHUNK_LATENTS + math.ceil(rest / _TIME_FACTOR)
    return frames, height // _SPACE_FACTOR, width // _SPACE_FACTOR


def clip_tokens(*, num_frames: int, height: int, width: int, model: STDiT3Config) -> tuple[int, int]:
    """(temporal, spatial) tokens of a clip: its latent, padded up to whole patches."""
    time, *space = (
        math.ceil(size / patch)
        for size, patch in zip(latent_size(num_frames, height, width), model.patch_size, strict=True)
    )
    return time, space[0] * space[1]


def clip_flops(
    *, num_frames: int, height: int, width: int, model: STDiT3Config, text_tokens: int | None = None
) -> float:
    """Floating-point operations of one clip's forward and backward pass; a multiplication with addition counts as two.

    Per video token and block, with width C, n tokens that attend to each other, L text tokens and N tokens in the clip:
    8 C² for the projections of self-attention and 4 C n for itself; 4 C² and 4 C L for cross-attention, 4 C² L / N for
    its keys and values; 4 r C² for an MLP of ratio r. A backward pass costs two forward passes. Patch embedding,
    modulation and the last layer are left out: with them, torch's FLOP counter differs by less than 0.1 % on
    STDiT3-XL/2.

    Args:
        num_frames: frames of the clip.
        height: in pixels.
        width: in pixels.
        model: sizes of the model.
        text_tokens: tokens of the caption; the model's longest unless given.
    """
    time, space = clip_tokens(num_frames=num_frames, height=height, width=width, model=model)
    tokens = time * space
    text = text_tokens if text_tokens is not None else model.model_max_length or _PUBLISHED_TEXT_TOKENS
    dense = (12 + 4 * model.mlp_ratio) * model.hidden_size**2
    attention = sum(4 * model.hidden_size * (attended + text) for attended in (space, time))
    text_projections = 2 * 4 * model.hidden_size**2 * text / tokens
    return 3.0 * tokens * model.depth * (2 * dense + attention + text_projections)


def shape_costs(
    shapes: Sequence[BucketShape], model: STDiT3Config, *, text_tokens: int | None = None
) -> NDArray[np.float64]:
    """FLOPs per clip of each shape, [len(shapes)]: what `build_plan` balances by."""
    return np.array(
        [
            clip_flops(
                num_frames=shape.num_frames,
                height=shape.height,
                width=shape.width,
                model=model,
                text_tokens=text_tokens,
            )
            for shape in shapes
        ]
    )
