"""The quickstart's own test: is each sampled clip nearer to the clip with its caption than to every other one?

Distances are mean squared differences of pixels (0 to 255) at the size of the model. A training clip is longer than a
sample and was trained on from random starts, so the distance to it is that to the nearest of its windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich import box
from rich.table import Table
from torch import Tensor

from opensora.datasets.reader import read_from_path
from opensora.models.vae.codec import VideoCodec

_HALF_RANGE = 127.5
"""Pixels are read as -1 to 1."""


@dataclass(frozen=True)
class NearestClips:
    """Distance of every sample (row) to every training clip (column), both in the order of the captions."""

    names: Sequence[str]
    distances: NDArray[Any]

    def __post_init__(self) -> None:
        assert self.distances.shape == (len(self.names), len(self.names)), "one sample per clip"

    @property
    def nearest(self) -> list[int]:
        """For every sample, the number of the nearest clip; -1 where none is nearer than all others."""
        result: list[int] = []
        for row in self.distances:
            best = np.flatnonzero(row == row.min())  # empty where a distance is not a number
            result.append(int(best[0]) if len(best) == 1 else -1)
        return result

    @property
    def num_right(self) -> int:
        """Samples whose nearest clip is the one with their caption."""
        return sum(found == wanted for wanted, found in enumerate(self.nearest))

    @property
    def all_right(self) -> bool:
        return self.num_right == len(self.names)

    def table(self) -> Table:
        """For a terminal: the nearest clip of each sample is set in brackets, green where it is the right one."""
        table = Table(title="mean squared distance of pixels; \\[nearest]", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("sampled \\ clip", no_wrap=True)
        for name in self.names:
            table.add_column(name, justify="right", overflow="fold", min_width=7)
        for wanted, (name, row, found) in enumerate(zip(self.names, self.distances, self.nearest, strict=True)):
            cells = [f"{value:.0f}" for value in row]
            if found >= 0:
                colour = "green" if found == wanted else "red"
                cells[found] = rf"[bold {colour}]\[{cells[found]}][/]"
            table.add_row(name, *cells)
        return table


def read_clip_pixels(path: str, *, height: int, width: int) -> Tensor:
    """All frames of a clip as training sees them: fp32 [3, T, height, width] in [-1, 1]."""
    return read_from_path(path, (height, width), "resize_crop")


def distance(sample: Tensor, clip: Tensor) -> float:
    """Mean squared difference between a sample and the nearest window of a clip, both [3, T, H, W] in [-1, 1]."""
    length = sample.shape[1]
    windows = range(clip.shape[1] - length + 1)
    differences = [float((sample - clip[:, start : start + length]).square().mean()) for start in windows]
    return min(differences) * _HALF_RANGE**2


def compare(names: Sequence[str], samples: Sequence[Tensor], clips: Sequence[Tensor]) -> NearestClips:
    """Distances of all samples to all clips."""
    return NearestClips(names, np.array([[distance(sample, clip) for clip in clips] for sample in samples]))


def round_trips(clips: Sequence[Tensor], codec: VideoCodec, *, num_frames: int) -> list[Tensor]:
    """The middle of every clip, encoded and decoded: the best that a model could give."""
    decoded = []
    for clip in clips:
        start = (clip.shape[1] - num_frames) // 2
        middle = clip[None, :, start : start + num_frames]
        with torch.no_grad():
            decoded.append(codec.decode(codec.encode(middle), num_frames=num_frames)[0].clamp(-1, 1))
    return decoded
