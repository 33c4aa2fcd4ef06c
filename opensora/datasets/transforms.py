"""From a decoded frame or image to pixels in [-1, 1] at the size of its bucket, as Open-Sora 1.2 does it.

`resize_crop` scales a picture until it covers the target and cuts what is over; `center` does so for squares. Frames
of a video are resized bilinearly without antialiasing (`align_corners=False`), images bicubically with it (PIL).

Written in numpy and not in torch: only the source lines that the result depends on are touched, which on frames much
larger than the target is several times faster, and reading threads need no torch. Equal to
`torch.nn.functional.interpolate` within fp32 rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from opensora.errors import ConfigError

TransformName = Literal["resize_crop", "center"]


@dataclass(frozen=True)
class Window:
    """A picture scaled to `height` x `width`, of which the part at (`top`, `left`) is kept."""

    height: int
    width: int
    top: int
    left: int
    scale: float | None = None
    """Scale that source coordinates are computed with; the ratio of the sizes unless given."""


@dataclass(frozen=True)
class _Taps:
    """The two source positions of every output position along one axis, and the weight of the second."""

    first: NDArray[np.intp]
    second: NDArray[np.intp]
    weight: NDArray[np.float32]


@dataclass(frozen=True)
class _Resampling:
    """Taps for frames of one size. Samples are bytes of a line of RGB pixels, within the part of it that is used."""

    rows: _Taps
    used: slice
    columns: _Taps
    """From samples to samples of a line that holds its red, then its green, then its blue ones."""


class ClipTransform:
    """Brings frames and images to one size.

    Args:
        name: `resize_crop` or `center`.
        height, width: target in pixels; `center` takes squares only, as in Open-Sora.

    Raises:
        ConfigError: unknown name, or `center` with another shape than a square.
    """

    def __init__(self, name: str, *, height: int, width: int) -> None:
        if name not in ("resize_crop", "center"):
            raise ConfigError(f"unknown transform {name!r}", hint="known transforms: resize_crop, center")
        if name == "center" and height != width:
            raise ConfigError(
                f"transform `center` makes squares, and the target is {height}x{width}", hint="use `resize_crop`"
            )
        self.name = name
        self.height = height
        self.width = width
        self._resampling: dict[tuple[int, int], _Resampling] = {}

    def frame(self, frame: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
        """Transform one frame of a video, uint8 [H, W, 3] with contiguous rows, into fp32 `out` [3, height, width]."""
        size = frame.shape[0], frame.shape[1]
        resampling = self._resampling.get(size)
        if resampling is None:
            resampling = self._resampling[size] = self._plan(*size)
        lines = frame.reshape(size[0], -1)[:, resampling.used]
        rows = _blend(lines[resampling.rows.first], lines[resampling.rows.second], resampling.rows.weight[:, None])
        columns = resampling.columns
        pixels = _blend(rows.take(columns.first, axis=1), rows.take(columns.second, axis=1), columns.weight)
        _normalise(pixels.reshape(self.height, 3, self.width).transpose(1, 0, 2), out)

    def image(self, image: Image.Image, out: NDArray[np.float32]) -> None:
        """Transform an RGB image into fp32 `out` [3, height, width]."""
        if self.name == "center":
            resized, window = _shrink_to_square(image, self.height)
        else:
            window = _cover(image.height, image.width, self.height, self.width, rounding="image")
            resized = image.resize((window.width, window.height), Image.Resampling.BICUBIC)
        box = (window.left, window.top, window.left + self.width, window.top + self.height)
        _normalise(np.asarray(resized.crop(box)).transpose(2, 0, 1), out)

    def _plan(self, height: int, width: int) -> _Resampling:
        if self.name == "center":
            window = _cover_square(height, width, self.height)
        else:
            window = _cover(height, width, self.height, self.width, rounding="video")
        rows = _bilinear_taps(height, window.height, window.top, self.height, scale=window.scale)
        columns = _bilinear_taps(width, window.width, window.left, self.width, scale=window.scale)
        begin, end = int(columns.first[0]), int(columns.second[-1]) + 1
        channels = np.arange(3)[:, None]
        samples = _Taps(
            ((columns.first - begin) * 3 + channels).ravel(),
            ((columns.second - begin) * 3 + channels).ravel(),
            np.tile(columns.weight, 3),
        )
        return _Resampling(rows, slice(begin * 3, end * 3), samples)


def _blend(
    first: NDArray[np.uint8 | np.float32], second: NDArray[np.uint8 | np.float32], weight: NDArray[np.float32]
) -> NDArray[np.float32]:
    """first + (second - first) * weight, in the memory of two fp32 arrays."""
    blended = first.astype(np.float32, copy=False)
    change = second.astype(np.float32, copy=False)
    change -= blended
    change *= weight
    blended += change
    return blended


def _normalise(pixels: NDArray[np.uint8 | np.float32], out: NDArray[np.float32]) -> None:
    """0..255 to -1..1, both [3, H, W]."""
    np.divide(pixels, np.float32(127.5), out=out)
    out -= 1


def _cover(height: int, width: int, to_height: int, to_width: int, *, rounding: Literal["video", "image"]) -> Window:
    """Smallest size of the same shape that covers the target, and the middle of it.

    Open-Sora rounds the offset of images to the nearest number and that of videos down.
    """
    if to_height / height > to_width / width:
        scaled = to_height, round(width * (to_height / height))
    else:
        scaled = round(height * (to_width / width)), to_width
    margins = scaled[0] - to_height, scaled[1] - to_width
    top, left = (round(margin / 2) if rounding == "image" else margin // 2 for margin in margins)
    return Window(*scaled, top, left)


def _cover_square(height: int, width: int, side: int) -> Window:
    """Scale by a factor (which torch then also uses for coordinates) until the short side fits; the middle of it."""
    scale = side / min(height, width)
    # The product may fall just short of the side, which would leave a line of pixels without a source.
    scaled = max(side, math.floor(height * scale)), max(side, math.floor(width * scale))
    return Window(*scaled, round((scaled[0] - side) / 2), round((scaled[1] - side) / 2), scale=scale)


def _shrink_to_square(image: Image.Image, side: int) -> tuple[Image.Image, Window]:
    """Centre crop of ADM (Dhariwal and Nichol, 2021): halve while twice too large, then bicubic."""
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    return image, Window(image.height, image.width, (image.height - side) // 2, (image.width - side) // 2)


def _bilinear_taps(size: int, scaled_size: int, start: int, length: int, *, scale: float | None) -> _Taps:
    """Taps of torch's bilinear interpolation (`align_corners=False`) from `size` to `scaled_size`, of a part of it.

    torch computes in fp32 with a fused multiply-add; doing it in fp64 and rounding once gives the same numbers.
    """
    step = np.float32(1 / scale) if scale is not None else np.float32(size) / np.float32(scaled_size)
    position = (np.arange(start, start + length) + 0.5) * np.float64(step) - 0.5
    position32 = np.maximum(position.astype(np.float32), np.float32(0))
    first = np.minimum(position32.astype(np.intp), size - 1)
    second = np.minimum(first + 1, size - 1)
    return _Taps(first, second, (position32 - first.astype(np.float32)).clip(0, 1))
