"""Writes clips: H.264 in MP4, and PNG for single pictures, whole or not at all."""

from __future__ import annotations

import io
import logging
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from opensora.errors import DataError, UsageError
from opensora.storage import Storage, locate

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_MAX_FPS_DENOMINATOR = 1001
"""Frame rates are fractions such as 30000/1001."""


def encode_video(frames: NDArray[np.uint8], *, fps: float, key_interval: int | None = None, crf: int = 18) -> bytes:
    """Encode frames as H.264 (yuv420p, which every player shows) in an MP4 that begins with its index.

    Args:
        frames: uint8 [T, H, W, 3]. An odd height or width gets one more line, equal to the last: yuv420p has half as
            many colour samples.
        fps: frames per second.
        key_interval: frames between key frames; the encoder's choice (at most 250) unless given.
        crf: 0 (lossless) to 51; 18 is hard to tell from the original.

    Raises:
        DataError: the frames have another shape or type, or there are none.
    """
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8 or 0 in frames.shape:
        raise DataError(
            f"cannot encode an array of shape {list(frames.shape)} and type {frames.dtype}",
            hint="give uint8 frames [T, H, W, 3]",
        )
    if fps <= 0:
        raise DataError(f"cannot encode a video of {fps} frames per second", hint="use a positive frame rate")
    pad = [(0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)]
    if frames.shape[1] % 2 or frames.shape[2] % 2:
        frames = np.pad(frames, pad, mode="edge")
    # Without x264's macroblock tree: its AVX-512 code reads memory that was never written, so that the same frames
    # became other bytes in one file of twenty.
    options = {"crf": str(crf), "preset": "medium", "mbtree": "0"}
    if key_interval is not None:
        # Closed groups of equal length: a reader can start at any of them.
        options |= {"g": str(key_interval), "keyint_min": str(key_interval), "sc_threshold": "0"}
    # To move the index to the front, FFmpeg reads the file again by its name.
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "clip.mp4"
        _encode(target, frames, Fraction(fps).limit_denominator(_MAX_FPS_DENOMINATOR), options)
        return target.read_bytes()


def _encode(target: Path, frames: NDArray[np.uint8], rate: Fraction, options: dict[str, str]) -> None:
    with av.open(str(target), mode="w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = cast("Any", container.add_stream("libx264", rate=rate, options=options))
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        # The same bytes on every machine, whatever its number of cores.
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode(None))


def write_video(storage: Storage, path: str, frames: NDArray[np.uint8], fps: float) -> None:
    """Write frames, uint8 [T, H, W, 3], as an MP4 (see `encode_video`). Readers see all of it or nothing."""
    storage.write(path, encode_video(frames, fps=fps))


def write_image(storage: Storage, path: str, image: NDArray[np.uint8]) -> None:
    """Write a picture, uint8 [H, W, 3], as PNG. Readers see all of it or nothing."""
    target = io.BytesIO()
    Image.fromarray(image).save(target, format="PNG")
    storage.write(path, target.getvalue())


def to_frames(x: torch.Tensor, *, value_range: tuple[float, float] = (-1.0, 1.0)) -> NDArray[np.uint8]:
    """Pixels [3, T, H, W] in `value_range` to frames uint8 [T, H, W, 3]; what is out of range is clipped."""
    low, high = value_range
    scaled = (x.detach().float().clamp(low, high) - low) / max(high - low, 1e-5)
    return scaled.mul(255).add(0.5).clamp(0, 255).byte().permute(1, 2, 3, 0).cpu().numpy()


def save_sample(
    x: torch.Tensor,
    save_path: str | None = None,
    fps: float = 8,
    normalize: bool = True,
    value_range: tuple[float, float] = (-1, 1),
    force_video: bool = False,
    verbose: bool = True,
) -> str:
    """Open-Sora's way to write a sample: `save_path` + ".png" for one frame, + ".mp4" for more or with `force_video`.

    Args:
        x: [3, T, H, W].
        save_path: without extension; local or in a bucket.
        fps: of the video.
        normalize: `x` is in `value_range`; otherwise it is in [0, 1] for a picture and in [0, 255] for a video.
        value_range: see `normalize`.
        force_video: write a single frame as a video.
        verbose: log where it went.

    Returns:
        The path with its extension.
    """
    if save_path is None:
        raise UsageError("save_sample needs save_path", hint="give the path without extension")
    is_picture = x.shape[1] == 1 and not force_video
    unscaled = (0.0, 1.0) if is_picture else (0.0, 255.0)
    frames = to_frames(x, value_range=value_range if normalize else unscaled)
    save_path += ".png" if is_picture else ".mp4"
    storage, name = locate(save_path)
    if is_picture:
        write_image(storage, name, frames[0])
    else:
        write_video(storage, name, frames, fps)
    if verbose:
        logger.info("saved %s", save_path)
    return save_path
