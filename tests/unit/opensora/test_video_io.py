"""Written clips: other programs can play them, pixels and rates survive, nothing half-written is ever seen."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from opensora.datasets import save_sample
from opensora.datasets.synthetic import synthetic_clip
from opensora.errors import DataError, UsageError
from opensora.sampling.video_io import encode_video, to_frames, write_image, write_video
from opensora.storage import Storage


def decoded(data: bytes) -> tuple[np.ndarray[Any, Any], Any]:
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        facts = (stream.codec_context.name, stream.codec_context.pix_fmt, stream.average_rate, stream.frames)
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]), facts


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


@pytest.mark.parametrize("fps", [8, 24, 29.97, 23.976, 120])
def test_a_video_is_h264_with_all_frames_at_its_rate(fps: float) -> None:
    frames, _ = synthetic_clip(2, num_frames=21, height=64, width=96)
    pixels, (codec, pix_fmt, rate, count) = decoded(encode_video(frames, fps=fps))
    assert (codec, pix_fmt, count) == ("h264", "yuv420p", 21)
    assert float(rate) == pytest.approx(fps, rel=1e-4)
    assert pixels.shape == frames.shape
    assert np.abs(pixels.astype(float) - frames).mean() < 6  # at the shape's edges: colour is stored at half the size


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (120, 130, 90)])
def test_colours_come_back_as_they_were(colour: tuple[int, int, int]) -> None:
    frames = np.broadcast_to(np.array(colour, np.uint8), (4, 32, 32, 3))
    pixels, _ = decoded(encode_video(frames, fps=24))
    assert np.abs(pixels.astype(int) - frames).max() <= 4


def test_the_usual_broadcast_rates_are_exact_fractions() -> None:
    frames, _ = synthetic_clip(2, num_frames=3, height=32, width=32)
    assert decoded(encode_video(frames, fps=30000 / 1001))[1][2] == Fraction(30000, 1001)


def test_odd_sizes_get_one_more_line_equal_to_the_last() -> None:
    frames, _ = synthetic_clip(2, num_frames=5, height=45, width=63)
    pixels, _ = decoded(encode_video(frames, fps=24, crf=1))
    assert pixels.shape == (5, 46, 64, 3)
    assert np.abs(pixels[:, :45, :63].astype(float) - frames).mean() < 6
    np.testing.assert_allclose(pixels[:, 45], pixels[:, 44], atol=16)


def test_one_frame_makes_a_video() -> None:
    assert decoded(encode_video(np.zeros((1, 16, 16, 3), np.uint8), fps=8))[0].shape == (1, 16, 16, 3)


def test_key_frames_come_as_often_as_asked_for() -> None:
    frames, _ = synthetic_clip(2, num_frames=40, height=32, width=32)
    with av.open(io.BytesIO(encode_video(frames, fps=24, key_interval=12))) as container:
        keys = [at for at, packet in enumerate(container.demux(video=0)) if packet.is_keyframe and packet.size]
    assert keys == [0, 12, 24, 36]


def test_the_index_comes_first_so_that_players_can_begin_at_once() -> None:
    data = encode_video(np.zeros((4, 16, 16, 3), np.uint8), fps=8)
    assert data.index(b"moov") < data.index(b"mdat")


def test_the_same_frames_give_the_same_bytes() -> None:
    frames, _ = synthetic_clip(9, num_frames=12, height=18, width=50)
    assert len({encode_video(frames, fps=24) for _ in range(40)}) == 1


@pytest.mark.parametrize(
    "frames", [np.zeros((0, 8, 8, 3), np.uint8), np.zeros((4, 8, 8, 3), np.float32), np.zeros((8, 8, 3), np.uint8)]
)
def test_what_is_no_video_is_refused(frames: Any) -> None:
    with pytest.raises(DataError, match="cannot encode"):
        encode_video(frames, fps=8)


def test_a_rate_that_is_not_positive_is_refused() -> None:
    with pytest.raises(DataError, match="0 frames per second"):
        encode_video(np.zeros((1, 8, 8, 3), np.uint8), fps=0)


def test_videos_and_images_are_written_through_the_storage(storage: Storage) -> None:
    frames, _ = synthetic_clip(4, num_frames=6, height=32, width=32)
    write_video(storage, "a/b/clip.mp4", frames, 12)
    write_image(storage, "a/picture.png", frames[0])
    assert [info.path for info in storage.list()] == ["a/b/clip.mp4", "a/picture.png"]
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(storage.read("a/picture.png")))), frames[0])
    assert decoded(storage.read("a/b/clip.mp4"))[1][3] == 6


def test_pixels_are_rounded_to_the_nearest_level_and_clipped() -> None:
    x = torch.tensor([-1.0, 1.0, 0.0, -7.0, 7.0, 1 / 255]).reshape(1, 6, 1, 1).expand(3, -1, -1, -1)
    assert to_frames(x)[:, 0, 0, 0].tolist() == [0, 255, 128, 0, 255, 128]


def test_every_level_survives_the_round_trip_through_minus_one_to_one() -> None:
    levels = torch.arange(256).reshape(1, 256, 1, 1).expand(3, -1, -1, -1)
    assert to_frames(levels / 127.5 - 1)[:, 0, 0, 0].tolist() == list(range(256))


def test_save_sample_names_files_as_open_sora_does(tmp_path: Path) -> None:
    x = torch.rand(3, 5, 32, 32) * 2 - 1
    assert save_sample(x, str(tmp_path / "v"), fps=8, verbose=False) == str(tmp_path / "v.mp4")
    assert save_sample(x[:, :1], str(tmp_path / "i")) == str(tmp_path / "i.png")
    assert save_sample(x[:, :1], str(tmp_path / "f"), force_video=True) == str(tmp_path / "f.mp4")
    assert decoded((tmp_path / "v.mp4").read_bytes())[0].shape == (5, 32, 32, 3)
    assert decoded((tmp_path / "f.mp4").read_bytes())[0].shape == (1, 32, 32, 3)
    expected = ((x[:, 0].permute(1, 2, 0) + 1) * 127.5).numpy()
    np.testing.assert_allclose(np.asarray(Image.open(tmp_path / "i.png")), expected, atol=0.51)


def test_save_sample_takes_another_range_or_none(tmp_path: Path) -> None:
    x = torch.full((3, 1, 8, 8), 0.5)
    save_sample(x, str(tmp_path / "a"), value_range=(0, 2), verbose=False)
    save_sample(x, str(tmp_path / "b"), normalize=False, verbose=False)
    assert np.asarray(Image.open(tmp_path / "a.png")).max() == 64
    assert np.asarray(Image.open(tmp_path / "b.png")).max() == 128


def test_save_sample_leaves_its_input_alone(tmp_path: Path) -> None:
    x = torch.full((3, 2, 8, 8), 3.0)
    save_sample(x, str(tmp_path / "a"), verbose=False)
    assert (x == 3).all()


def test_save_sample_needs_a_path() -> None:
    with pytest.raises(UsageError, match="save_path"):
        save_sample(torch.zeros(3, 1, 8, 8))
