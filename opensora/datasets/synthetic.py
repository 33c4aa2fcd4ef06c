"""Clips that are computed: a coloured shape that moves over a coloured ground, with a caption that says so.

They let tests and smoke runs use real pixels of any size and length without a file at hand.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_COLOURS = {
    "red": (214, 39, 40), "green": (44, 160, 44), "blue": (31, 70, 220), "yellow": (240, 220, 40),
    "white": (245, 245, 245), "black": (15, 15, 15), "orange": (255, 127, 14), "purple": (128, 40, 160),
}  # fmt: skip
_SHAPES = ("circle", "square", "diamond")
_DIRECTIONS = {"right": (0.0, 1.0), "left": (0.0, -1.0), "down": (1.0, 0.0), "up": (-1.0, 0.0)}


def synthetic_clip(
    index: int, *, num_frames: int, height: int, width: int, frame_step: float = 0.02
) -> tuple[NDArray[np.uint8], str]:
    """The clip of this number: frames uint8 [T, H, W, 3], all different, and their caption.

    Numbers up to 671 give different captions. The shape moves by `frame_step` of the picture's size per frame, and
    comes back on the other side.
    """
    colours, directions = list(_COLOURS), list(_DIRECTIONS)
    colour = colours[index % 8]
    ground = colours[(index % 8 + 1 + index // 8 % 7) % 8]
    shape = _SHAPES[index // 56 % 3]
    direction = directions[index // 168 % 4]
    step = np.array(_DIRECTIONS[direction]) * frame_step
    # Coordinates relative to the picture's size; the distance to the centre goes round the edges.
    y, x = np.meshgrid((np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij")
    frames = np.empty((num_frames, height, width, 3), np.uint8)
    for number in range(num_frames):
        dy, dx = (np.abs((axis - 0.5 - step[i] * number + 0.5) % 1 - 0.5) for i, axis in enumerate((y, x)))
        distance = {"circle": np.hypot(dy, dx), "square": np.maximum(dy, dx), "diamond": dy + dx}[shape]
        frames[number] = np.where(distance[..., None] < 0.25, _COLOURS[colour], _COLOURS[ground])
    return frames, f"a {colour} {shape} moving {direction} over a {ground} ground"
