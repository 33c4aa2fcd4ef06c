"""Reader: frame numbers are those of a full decode, only what is needed is read, bad files are named."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from opensora.datasets.reader import (
    ReadingStoppedError,
    Video,
    is_image,
    read_clip,
    read_from_path,
    read_image,
    sample_frames,
)
from opensora.datasets.synthetic import synthetic_clip
from opensora.errors import DataError, ObjectNotFoundError
from opensora.sampling.video_io import encode_video
from opensora.storage import Storage

NUM_FRAMES = 70


@dataclass(frozen=True)
class Recipe:
    """How a test video is made."""

    codec: str = "libx264"
    name: str = "clip.mp4"
    options: dict[str, str] = field(default_factory=dict)
    muxer: dict[str, str] = field(default_factory=dict)
    pix_fmt: str = "yuv420p"
    times: Callable[[int], int] = lambda number: number
    """Frame number → time stamp in 1/25 s."""
    is_seekable: bool = True
    """Frames are found by the index, not by decoding all."""
    audio: bool = False


def encode(recipe: Recipe, *, num_frames: int = NUM_FRAMES, height: int = 48, width: int = 64) -> bytes:
    moving, _ = synthetic_clip(5, num_frames=num_frames, height=height, width=width)
    # Some noise, so that every frame differs from its neighbours after compression.
    noise = np.random.default_rng(0).integers(0, 60, moving.shape, dtype=np.uint8)
    kind = {"mp4": "mp4", "mov": "mov", "mkv": "matroska", "avi": "avi", "webm": "webm", "m2ts": "mpegts"}
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "video"
        with av.open(str(target), "w", format=kind[recipe.name.rpartition(".")[2]], options=recipe.muxer) as container:
            stream: Any = container.add_stream(recipe.codec, rate=25, options=recipe.options)
            stream.height, stream.width, stream.pix_fmt = height, width, recipe.pix_fmt
            stream.time_base = stream.codec_context.time_base = Fraction(1, 25)
            stream.codec_context.thread_count = 1
            sound: Any = container.add_stream("aac", rate=8000) if recipe.audio else None
            for number, pixels in enumerate(moving // 2 + noise):
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts, frame.time_base = recipe.times(number), Fraction(1, 25)
                container.mux(stream.encode(frame))
                if sound is not None:
                    tone = av.AudioFrame.from_ndarray(np.zeros((1, 320), np.float32), format="fltp", layout="mono")
                    tone.sample_rate, tone.pts = 8000, number * 320
                    container.mux(sound.encode(tone))
            container.mux(stream.encode(None))
        return target.read_bytes()


def full_decode(data: bytes) -> list[NDArray[np.uint8]]:
    """What PyAV gives for the whole file: the truth that frame numbers refer to."""
    with av.open(io.BytesIO(data)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


def read(video: Video, indices: Sequence[int]) -> list[NDArray[np.uint8]]:
    got: dict[int, NDArray[np.uint8]] = {}
    while not video.read(indices, lambda at, frame: got.__setitem__(at, frame.copy())):
        got.clear()
    return [got[at] for at in range(len(indices))]


X264 = "keyint=16:min-keyint=16:scenecut=0:"
B_FRAMES = {"x264-params": X264 + "bframes=3:b-adapt=0"}
RECIPES = {
    "one-key-frame": Recipe(options={"g": "250"}),
    "no-b-frames": Recipe(options={"g": "10", "bf": "0"}),
    "b-pyramid": Recipe(options={"x264-params": X264 + "bframes=7:b-pyramid=normal:ref=4:b-adapt=0"}),
    "open-gop": Recipe(options={"x264-params": X264 + "bframes=3:open-gop=1:b-adapt=0"}),
    # Its key frames are places from which the picture recovers some frames later.
    "intra-refresh": Recipe(options={"x264-params": "keyint=20:intra-refresh=1:bframes=2"}, is_seekable=False),
    "interlaced": Recipe(options={"x264-params": X264 + "tff=1:bframes=2"}),
    "ten-bit": Recipe(options={"x264-params": X264}, pix_fmt="yuv420p10le"),
    "variable-rate": Recipe(options=B_FRAMES, times=lambda n: n * 2 + (n % 5 == 0) + 30 * (n > 40)),
    "late-start": Recipe(options=B_FRAMES, times=lambda n: n + 500),
    "with-audio": Recipe(options=B_FRAMES, audio=True),
    "quicktime": Recipe(options=B_FRAMES, name="clip.mov"),
    "hevc-open-gop": Recipe(codec="libx265", options={"x265-params": "keyint=16:min-keyint=16:log-level=none"}),
    "av1": Recipe(codec="libsvtav1", options={"g": "16", "preset": "12"}),
    "prores": Recipe(codec="prores_ks", name="clip.mov", pix_fmt="yuv422p10le"),
    # An index that covers the first fragment alone, or nothing.
    "fragments": Recipe(options=B_FRAMES, muxer={"movflags": "frag_keyframe"}, is_seekable=False),
    "only-fragments": Recipe(options=B_FRAMES, muxer={"movflags": "frag_keyframe+empty_moov"}, is_seekable=False),
    "indexed-fragments": Recipe(
        options=B_FRAMES,
        muxer={"movflags": "frag_keyframe+empty_moov+default_base_moof+global_sidx"},
        is_seekable=False,
    ),
    # Containers that do not say how many frames there are, or where, or when they are shown.
    "matroska": Recipe(options=B_FRAMES, name="clip.mkv", is_seekable=False),
    "webm": Recipe(codec="libvpx-vp9", options={"deadline": "realtime"}, name="clip.webm", is_seekable=False),
    "hidden-frames": Recipe(
        codec="libvpx", options={"deadline": "good", "auto-alt-ref": "1", "lag-in-frames": "16"}, name="clip.webm",
        is_seekable=False,
    ),
    "avi": Recipe(codec="mpeg4", options={"bf": "2", "g": "12"}, name="clip.avi", is_seekable=False),
    "mpeg4-in-mp4": Recipe(codec="mpeg4", options={"bf": "2", "g": "12"}, is_seekable=False),
    "transport-stream": Recipe(options=B_FRAMES, name="clip.m2ts", is_seekable=False),
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_frame_numbers_are_those_of_a_full_decode(name: str, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = RECIPES[name]
    # Run by root, SVT-AV1 gives the thread that starts it, and all that this one starts later, real-time priority.
    with ThreadPoolExecutor(1) as pool:
        data = pool.submit(encode, recipe).result()
    storage.write(recipe.name, data)
    truth = full_decode(data)
    rng = np.random.default_rng(7)
    with Video(storage, recipe.name) as video:
        assert video.num_frames == len(truth)
        requests = [sorted(rng.choice(len(truth), size=int(rng.integers(1, 20)), replace=False)) for _ in range(8)]
        requests += [[0], [len(truth) - 1], list(range(len(truth))), [3, 3, 40]]
        requests += [list(range(start, start + 5)) for start in range(0, len(truth) - 5, 3)]
        if recipe.is_seekable:
            monkeypatch.setattr(Video, "_decode_all", lambda self: pytest.fail("decoded everything"))
        for request in requests:
            frames = read(video, [int(index) for index in request])
            for index, frame in zip(request, frames, strict=True):
                np.testing.assert_array_equal(frame, truth[index], err_msg=f"frame {index}")


@pytest.mark.parametrize("drop", [1, 5, 20, 37])
def test_frames_that_an_edit_list_hides_are_not_counted(
    drop: int, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As left behind by cutting without encoding: decoding begins at a key frame, showing later."""
    source = io.BytesIO(encode(Recipe(options=B_FRAMES)))
    target = io.BytesIO()
    with av.open(source) as old, av.open(target, "w", format="mp4", options={"avoid_negative_ts": "disabled"}) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        offset: int | None = None
        for packet in old.demux(old.streams.video[0]):
            if not packet.size or packet.pts is None or packet.dts is None:
                continue
            step = packet.duration or 0
            offset = drop * step if offset is None else offset
            packet.pts, packet.dts = packet.pts - offset, packet.dts - offset
            packet.stream = stream
            new.mux(packet)
    data = target.getvalue()
    truth = full_decode(data)
    assert len(truth) == NUM_FRAMES - drop
    storage.write("cut.mp4", data)
    monkeypatch.setattr(Video, "_decode_all", lambda self: pytest.fail("decoded everything"))
    with Video(storage, "cut.mp4") as video:
        assert video.num_frames == len(truth)
        for start in range(len(truth) - 4):
            for at, frame in enumerate(read(video, range(start, start + 4))):
                np.testing.assert_array_equal(frame, truth[start + at])


class CountingFile(io.RawIOBase):
    def __init__(self, data: bytes, seen: set[int]) -> None:
        self._file, self._seen = io.BytesIO(data), seen

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        start = self._file.tell()
        count = self._file.readinto(buffer)
        self._seen.update(range(start // 4096, (start + count + 4095) // 4096))
        return count


def test_only_the_bytes_around_the_wanted_frames_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(Recipe(options=B_FRAMES), num_frames=300, height=96, width=96)
    storage = Storage(str(tmp_path))
    storage.write("long.mp4", data)
    seen: set[int] = set()
    monkeypatch.setattr(Storage, "open", lambda self, path: CountingFile(data, seen))
    with Video(storage, "long.mp4") as video:
        read(video, [200, 205])
    assert len(seen) * 4096 < 0.4 * len(data)


@pytest.mark.parametrize("total", [1, 2, 16, 17, 51, 52, 53, 200])
def test_windows_begin_anywhere_that_the_original_allows(total: int) -> None:
    num_frames, interval = (1, 1) if total < 16 else (16, 3)
    size = num_frames * interval
    begins = set()
    for seed in range(2000):
        indices = sample_frames(total, num_frames=num_frames, frame_interval=interval, rng=np.random.default_rng(seed))
        begins.add(indices[0])
        end = min(indices[0] + size, total)
        assert indices == [int(x) for x in np.linspace(indices[0], end - 1, num_frames)]
    assert begins == set(range(max(0, total - size - 1) + 1))


def test_sampling_matches_the_reference_values() -> None:
    indices = sample_frames(48, num_frames=16, frame_interval=3, rng=np.random.default_rng(0))
    assert indices[:9] == [0, 3, 6, 9, 12, 15, 18, 21, 25]


def test_a_video_says_how_large_its_frames_are(storage: Storage) -> None:
    storage.write("clip.mp4", encode(Recipe(), height=36, width=80))
    with Video(storage, "clip.mp4") as video:
        assert read(video, [0])[0].shape == (video.height, video.width, 3) == (36, 80, 3)


def test_too_few_frames_name_the_file_and_both_numbers(storage: Storage) -> None:
    storage.write("short.mp4", encode(Recipe(), num_frames=10))
    with pytest.raises(DataError, match=r"short\.mp4: has 10 frames, and 11 are needed"):
        read_clip(storage, "short.mp4", num_frames=11, rng=np.random.default_rng(0))


def test_a_clip_is_the_same_for_the_same_draws_and_carries_rate_and_numbers(storage: Storage) -> None:
    data = encode(Recipe(options=B_FRAMES))
    storage.write("clip.mp4", data)
    truth = full_decode(data)
    clips = [
        read_clip(storage, "clip.mp4", num_frames=8, frame_interval=2, rng=np.random.default_rng(3)) for _ in range(2)
    ]
    assert clips[0].fps == 25.0
    assert clips[0].indices == clips[1].indices
    np.testing.assert_array_equal(clips[0].frames, clips[1].frames)
    np.testing.assert_array_equal(clips[0].frames, [truth[index] for index in clips[0].indices])


def test_a_long_video_is_read_in_the_memory_of_its_clip(storage: Storage) -> None:
    """Decoded frames that are not asked for are not kept (FFmpeg's own memory is measured by the benchmark)."""
    storage.write("clip.mp4", encode(Recipe(options={"g": "250"}), num_frames=200, height=96, width=96))
    tracemalloc.start()
    try:
        with Video(storage, "clip.mp4") as video:
            video.read([190, 191], lambda at, frame: None)
        assert tracemalloc.get_traced_memory()[1] < 20 * 96 * 96 * 3
    finally:
        tracemalloc.stop()


# ------------------------------------------------------------------------------------------------------ bad files


def audio_only() -> bytes:
    target = io.BytesIO()
    with av.open(target, "w", format="mp4") as container:
        stream: Any = container.add_stream("aac", rate=8000)
        for number in range(5):
            tone = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            tone.sample_rate, tone.pts = 8000, number * 1024
            container.mux(stream.encode(tone))
        container.mux(stream.encode(None))
    return target.getvalue()


def without_frames() -> bytes:
    target = io.BytesIO()
    with av.open(target, "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=25)
        stream.height = stream.width = 64
        stream.pix_fmt = "yuv420p"
        container.start_encoding()
    return target.getvalue()


def damaged() -> bytes:
    data = bytearray(encode(Recipe(options={"g": "8"})))
    middle = data.index(b"mdat") + 8
    for position in range(middle + 2000, data.index(b"moov") - 2000, 7):
        data[position] ^= 0x5A
    return bytes(data)


def at_the_front() -> bytes:
    """With the index first, so that a cut file still looks like a video."""
    return encode_video(synthetic_clip(1, num_frames=40, height=64, width=64)[0], fps=25)


BAD_VIDEOS: dict[str, tuple[Callable[[], bytes], str]] = {
    "cut-off-before-the-index": (lambda: encode(Recipe())[:-500], "cannot be decoded.*begins like an MP4"),
    "cut-off-in-the-frames": (lambda: at_the_front()[:-2000], "cut off: 40 frames are listed up to byte"),
    "empty": (lambda: b"", "the file is empty"),
    "audio-only": (audio_only, "no video in it, only audio"),
    "no-frames": (without_frames, "clip.mp4: "),
    "text": (lambda: b"This is not a video, it is a text.", "begins with the text 'This is not a vi'"),
    "noise": (lambda: bytes(range(256)) * 40, "cannot be decoded"),
    "damaged-frames": (damaged, "damaged|cannot be decoded"),
}


@pytest.mark.parametrize("name", BAD_VIDEOS)
def test_a_bad_video_is_an_error_that_names_the_file_and_what_is_wrong(name: str, storage: Storage) -> None:
    make, reason = BAD_VIDEOS[name]
    storage.write("clip.mp4", make())
    with pytest.raises(DataError, match=reason) as caught:
        read_clip(storage, "clip.mp4", num_frames=30, rng=np.random.default_rng(0))
    assert storage.uri_of("clip.mp4") in str(caught.value)
    assert caught.value.exit_code == 65


def test_a_missing_video_is_an_error_that_names_the_file(storage: Storage) -> None:
    with pytest.raises(ObjectNotFoundError, match=r"missing\.mp4"):
        read_clip(storage, "missing.mp4", num_frames=4, rng=np.random.default_rng(0))


def test_files_are_closed_whatever_happens(storage: Storage) -> None:
    storage.write("good.mp4", encode(Recipe(options=B_FRAMES)))
    for number, (make, _) in enumerate(BAD_VIDEOS.values()):
        storage.write(f"bad-{number}.mp4", make())
    before = len(os.listdir("/proc/self/fd"))
    for number in range(len(BAD_VIDEOS)):
        with pytest.raises(DataError):
            read_clip(storage, f"bad-{number}.mp4", num_frames=30, rng=np.random.default_rng(0))
    for _ in range(3):
        read_clip(storage, "good.mp4", num_frames=4, rng=np.random.default_rng(0))
    assert len(os.listdir("/proc/self/fd")) == before


def test_reading_stops_when_told_to(storage: Storage) -> None:
    storage.write("clip.mp4", encode(Recipe(options={"g": "250"})))
    asked = []

    def should_stop() -> bool:
        asked.append(None)
        return len(asked) > 20

    with pytest.raises(ReadingStoppedError), Video(storage, "clip.mp4", should_stop=should_stop) as video:
        video.read(range(NUM_FRAMES), lambda at, frame: None)
    assert len(asked) == 21


# --------------------------------------------------------------------------------------------------------- images


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    target = io.BytesIO()
    image.save(target, format=kind, **options)
    return target.getvalue()


def test_an_image_is_read_as_rgb(storage: Storage) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    storage.write("a.png", saved(Image.fromarray(pixels), "PNG"))
    storage.write("alpha.png", saved(Image.fromarray(pixels).convert("RGBA"), "PNG"))
    storage.write("grey.png", saved(Image.fromarray(pixels[..., 0]), "PNG"))
    np.testing.assert_array_equal(np.asarray(read_image(storage, "a.png")), pixels)
    np.testing.assert_array_equal(np.asarray(read_image(storage, "alpha.png")), pixels)
    np.testing.assert_array_equal(np.asarray(read_image(storage, "grey.png")), np.stack([pixels[..., 0]] * 3, -1))


def test_sixteen_bits_are_brought_to_eight(storage: Storage) -> None:
    storage.write("deep.png", saved(Image.fromarray(np.full((4, 4), 0x80FF, np.uint16)), "PNG"))
    assert (np.asarray(read_image(storage, "deep.png")) == 0x80).all()


NAN_PIXELS = np.where(np.eye(16, dtype=bool), np.float32("nan"), np.float32(0.5))
BAD_IMAGES: dict[str, tuple[Callable[[], bytes], str]] = {
    "cut-off": (lambda: saved(Image.fromarray(np.zeros((99, 99, 3), np.uint8)), "JPEG")[:-300], "damaged image"),
    "empty": (lambda: b"", "not an image .the file is empty."),
    "a-video": (lambda: encode(Recipe(), num_frames=2), "not an image .it begins like an MP4 file."),
    "nan-pixels": (lambda: saved(Image.fromarray(NAN_PIXELS), "TIFF"), r"16 of 256 pixels are not finite .NaN."),
    "float-pixels": (lambda: saved(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "no agreed range"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_image_is_an_error_that_names_the_file_and_what_is_wrong(name: str, storage: Storage) -> None:
    make, reason = BAD_IMAGES[name]
    storage.write("image.jpg", make())
    with pytest.raises(DataError, match=reason) as caught:
        read_image(storage, "image.jpg")
    assert storage.uri_of("image.jpg") in str(caught.value)


@pytest.mark.parametrize(
    ("path", "expected"), [("a/b.MP4", False), ("s3://c/d.mov", False), ("x.JPeG", True), ("x.webp", True)]
)
def test_the_extension_says_what_is_an_image(path: str, expected: bool) -> None:
    assert is_image(path) is expected


def test_an_unknown_extension_is_refused_with_the_known_ones() -> None:
    with pytest.raises(DataError, match=r"notes\.txt: unknown extension '\.txt'(.|\n)*\.mp4"):
        is_image("s3://bucket/notes.txt")


# -------------------------------------------------------------------------------------------------- compatibility


def test_read_from_path_gives_whole_videos_and_single_images(storage: Storage, tmp_path: Path) -> None:
    data = encode(Recipe())
    storage.write("clip.mp4", data)
    video = read_from_path(str(tmp_path / "clip.mp4"), (24, 32), transform_name="resize_crop")
    assert video.shape == (3, NUM_FRAMES, 24, 32)
    middle = np.stack(full_decode(data)).mean() / 127.5 - 1
    assert abs(float(video.mean()) - middle) < 0.01
    assert float(video.min()) >= -1
    assert float(video.max()) <= 1
    storage.write("image.png", saved(Image.fromarray(np.full((50, 50, 3), 255, np.uint8)), "PNG"))
    image = read_from_path(str(tmp_path / "image.png"), (16, 16))
    assert image.shape == (3, 1, 16, 16)
    assert (image == 1).all()


def test_the_names_that_scripts_import_are_there_and_planning_needs_no_torch() -> None:
    code = """
import sys
import opensora.datasets.plan, opensora.datasets.catalogue, opensora.datasets.bucket
assert "torch" not in sys.modules and "av" not in sys.modules
from opensora.datasets import Bucket, get_image_size, read_from_path, save_sample
assert get_image_size("144p", "9:16") == (144, 256)
import opensora.datasets
assert not hasattr(opensora.datasets, "nothing_of_this_name")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
