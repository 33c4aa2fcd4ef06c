"""Frames out of videos, and pixels out of images, wherever they are stored.

A video is read by byte range. Only what is needed is decoded: from the last key frame before the first frame asked
for to the last one, leaving out pictures that no other one refers to; only frames that are asked for are converted.
Frames are addressed by their number in a full decode, whatever their time stamps. Where the container does not tell
that number beyond doubt, all of it is decoded instead.

What can be wrong with a file is a DataError that names the file; trouble with the store is a StorageError.
"""

from __future__ import annotations

import bisect
import io
import itertools
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

import av
import numpy as np
from av.error import FFmpegError
from av.stream import Discard
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from opensora.datasets.catalogue import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from opensora.datasets.transforms import ClipTransform
from opensora.errors import DataError
from opensora.storage import Storage, locate

if TYPE_CHECKING:
    import torch

IMAGE_FPS = 120.0
"""Frame rate that the model is told for an image."""
UNKNOWN_FPS = 24.0
"""Frame rate of a video that does not say."""

FrameSink = Callable[[int, NDArray[np.uint8]], None]
"""Takes (position in the request, frame as uint8 [H, W, 3], a view that is valid during the call).

A request may be started again, so a sink stores and does not add up.
"""

_ONE_FRAME_PER_PACKET = frozenset({"h264", "hevc", "av1", "vp9", "mjpeg", "prores", "ffv1"})
"""Codecs of which a packet of a container holds exactly one shown frame. Others may hide frames, or hold two."""


class ReadingStoppedError(Exception):
    """Reading was ended from outside, before the frames were there."""


class _IndexDoubtedError(Exception):
    """The container's index does not tell which frame is which."""


def is_image(path: str) -> bool:
    """Whether a catalogue row of this name is read as an image.

    Raises:
        DataError: the extension is neither that of an image nor that of a video.
    """
    extension = PurePosixPath(path).suffix.lower()
    if extension in IMAGE_EXTENSIONS:
        return True
    if extension in VIDEO_EXTENSIONS:
        return False
    known = " ".join(VIDEO_EXTENSIONS + IMAGE_EXTENSIONS)
    raise DataError(f"{path}: unknown extension {extension!r}", hint=f"known extensions: {known}")


def sample_frames(total: int, *, num_frames: int, frame_interval: int, rng: np.random.Generator) -> list[int]:
    """Draw the frames of a clip: `num_frames` of a random window of `num_frames * frame_interval` frames.

    Open-Sora's temporal random crop: the window begins at randint(0, max(0, total - size - 1)), both ends included, and
    the frames are spread evenly over it, truncated to whole numbers.

    Raises:
        DataError: fewer than `num_frames` frames in all.
    """
    size = num_frames * frame_interval
    begin = int(rng.integers(0, max(0, total - size - 1), endpoint=True))
    end = min(begin + size, total)
    if end - begin < num_frames:
        raise DataError(
            f"has {total} frames, and {num_frames} are needed", hint="correct `num_frames` in the catalogue"
        )
    return [int(index) for index in np.linspace(begin, end - 1, num_frames)]


@dataclass(frozen=True)
class DecodedClip:
    """Frames of a video."""

    frames: NDArray[np.uint8]
    """[T, H, W, 3]"""
    fps: float
    """Of the container, 24 where it does not say."""
    indices: list[int]
    """Number of each frame in the video."""


def read_clip(
    storage: Storage, path: str, *, num_frames: int, frame_interval: int = 1, rng: np.random.Generator
) -> DecodedClip:
    """Read randomly placed frames of a video (see `sample_frames`).

    Raises:
        DataError: the file cannot be decoded or is too short.
        StorageError: it cannot be fetched.
    """
    with Video(storage, path) as video:
        frames: NDArray[np.uint8] | None = None

        def store(position: int, frame: NDArray[np.uint8]) -> None:
            nonlocal frames
            if frames is None:
                frames = np.empty((num_frames, *frame.shape), dtype=np.uint8)
            if frame.shape != frames.shape[1:]:
                raise DataError(f"{video.uri}: the size of the picture changes within the video")
            frames[position] = frame

        indices = video.read_sampled(num_frames=num_frames, frame_interval=frame_interval, rng=rng, sink=store)
        assert frames is not None
        return DecodedClip(frames, video.fps, indices)


def read_image(storage: Storage, path: str) -> Image.Image:
    """Read an image as RGB; transparency is dropped and 16-bit greys are brought to 8 bits.

    Raises:
        DataError: it cannot be decoded, is cut off, or has 32-bit pixels, whose range is anybody's guess.
        StorageError: it cannot be fetched.
    """
    uri, data = storage.uri_of(path), storage.read(path)
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            if image.mode in ("F", "I"):
                pixels = np.asarray(image)
                if not np.isfinite(pixels).all():
                    bad = int((~np.isfinite(pixels)).sum())
                    raise DataError(f"{uri}: {bad} of {pixels.size} pixels are not finite (NaN)", hint="repair it")
                raise DataError(f"{uri}: 32-bit pixels have no agreed range", hint="convert the image to 8 bits")
            if image.mode.startswith("I;16"):
                return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
            return image.convert("RGB")
    except UnidentifiedImageError:
        raise DataError(f"{uri}: not an image ({_describe(data)})", hint="correct its name or remove it") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{uri}: damaged image: {error}", hint="repair it or remove it from the catalogue") from error


def read_from_path(path: str, image_size: tuple[int, int], transform_name: str = "center") -> torch.Tensor:
    """Open-Sora's reader of one whole file, in a folder or a bucket: fp32 [3, T, H, W] in [-1, 1], images with T = 1.

    Raises:
        DataError: the file cannot be decoded.
        StorageError: it cannot be fetched.
    """
    import torch  # only here: the reading of clips needs none

    storage, name = locate(path)
    transform = ClipTransform(transform_name, height=image_size[0], width=image_size[1])
    if is_image(name):
        image = torch.empty(3, 1, *image_size)
        transform.image(read_image(storage, name), image[:, 0].numpy())
        return image
    with Video(storage, name) as video:
        is_complete = False
        while not is_complete:
            clip = torch.empty(3, video.num_frames, *image_size)
            is_complete = video.read(range(video.num_frames), partial(_transform_into, transform, clip.numpy()))
        return clip


def _transform_into(
    transform: ClipTransform, out: NDArray[np.float32], position: int, frame: NDArray[np.uint8]
) -> None:
    transform.frame(frame, out[:, position])


class Video(AbstractContextManager["Video"]):
    """An open video. Not for use by several threads at once.

    Args:
        num_decoder_threads: 1 where several clips are decoded at a time.
        should_stop: asked between packets; reading ends with ReadingStoppedError once it says yes.

    Raises:
        DataError: this is not a video, or one without frames.
        StorageError: it cannot be fetched.
    """

    def __init__(
        self,
        storage: Storage,
        path: str,
        *,
        num_decoder_threads: int = 1,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.uri = storage.uri_of(path)
        self._storage = storage
        self._path = path
        self._num_decoder_threads = num_decoder_threads
        self._should_stop = should_stop
        self._reformatter = VideoReformatter()
        self._resources = ExitStack()
        self._open()
        try:
            rate = self._stream.average_rate
            self.fps = float(rate) if rate else UNKNOWN_FPS
            """Average frame rate of the container."""
            self.height: int = self._stream.height
            """In pixels, as frames are stored: a rotation that the file asks for is not applied."""
            self.width: int = self._stream.width
            """In pixels."""
            self._index: _FrameIndex | None = None
            with self._decoding():
                try:
                    self._index = _read_index(self.uri, self._container, self._stream, self._file)
                    self.num_frames = self._index.num_frames
                    """Frames that a full decode gives."""
                except _IndexDoubtedError:
                    self.num_frames = self._count()
            if not self.num_frames:
                raise DataError(f"{self.uri}: a video without frames", hint="remove it from the catalogue")
        except BaseException:
            self.close()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the container and the file."""
        self._resources.close()

    def read_sampled(
        self, *, num_frames: int, frame_interval: int, rng: np.random.Generator, sink: FrameSink
    ) -> list[int]:
        """Draw frames (see `sample_frames`) and hand them to `sink`; returns their numbers."""
        while True:
            try:
                indices = sample_frames(self.num_frames, num_frames=num_frames, frame_interval=frame_interval, rng=rng)
            except DataError as error:
                raise DataError(f"{self.uri}: {error.message}", hint=error.hint) from None
            if self.read(indices, sink):
                return indices

    def read(self, indices: Sequence[int], sink: FrameSink) -> bool:
        """Decode the frames of these numbers (ascending) and hand each to `sink`.

        Returns:
            False where the container turned out to be wrong about the number of frames: `num_frames` is right now, and
            the request must be made anew.
        """
        if not indices:
            return True
        with self._decoding():
            if self._index is not None:
                try:
                    self._read_by_index(self._index, indices, sink)
                    return True
                except (_IndexDoubtedError, FFmpegError):
                    # A damaged file, or a container that lies. A full decode tells, and is what the numbers refer to.
                    self._index = None
                    promised, self.num_frames = self.num_frames, self._count()
                    if self.num_frames != promised:
                        return False
            self._read_by_counting(indices, sink)
        return True

    def _open(self) -> None:
        """(Re)open the container at its beginning."""
        self.close()
        self._file = self._resources.enter_context(self._storage.open(self._path))
        with self._decoding():
            source = cast("Any", _DemuxerFile(self._file))
            self._container = self._resources.enter_context(av.open(source, mode="r", buffer_size=1 << 16))
            streams = [stream for stream in self._container.streams.video if not stream.disposition & _ATTACHED_PICTURE]
            if not streams:
                kinds = ", ".join(sorted({stream.type for stream in self._container.streams})) or "nothing"
                raise DataError(f"{self.uri}: no video in it, only {kinds}", hint="remove it from the catalogue")
            self._stream = streams[0]
            for stream in self._container.streams:
                if stream is not self._stream:
                    stream.discard = Discard.all
            self._stream.codec_context.thread_count = self._num_decoder_threads
            if self._num_decoder_threads > 1:
                self._stream.codec_context.thread_type = "AUTO"

    @contextmanager
    def _decoding(self) -> Iterator[None]:
        """Translate FFmpeg's errors; close what an error leaves open."""
        try:
            yield
        except FFmpegError as error:
            self.close()
            raise DataError(
                f"{self.uri}: cannot be decoded: {error.strerror} ({self._describe()})",
                hint="repair the file or remove it from the catalogue",
            ) from error
        except BaseException:
            self.close()
            raise

    def _describe(self) -> str:
        return _describe(self._storage.read_range(self._path, 0, 16))

    def _check_stop(self) -> None:
        if self._should_stop():
            raise ReadingStoppedError(self.uri)

    def _decode_all(self) -> Iterator[Any]:
        self._open()
        for frame in self._container.decode(self._stream):
            self._check_stop()
            yield frame

    def _count(self) -> int:
        count = sum(1 for _ in self._decode_all())
        self._open()
        return count

    def _read_by_counting(self, indices: Sequence[int], sink: FrameSink) -> None:
        positions = _positions(indices)
        with closing(cast("Any", self._decode_all())) as frames:
            for index, frame in enumerate(frames):
                if index in positions:
                    if frame.is_corrupt:
                        raise DataError(f"{self.uri}: frame {index} is damaged", hint="repair it or remove it")
                    self._hand_over(frame, positions.pop(index), sink)
                    if not positions:
                        return
        raise DataError(f"{self.uri}: ends before frame {min(positions)}", hint="repair the file or remove it")

    def _read_by_index(self, index: _FrameIndex, indices: Sequence[int], sink: FrameSink) -> None:
        positions = _positions(indices)
        packets, number_of = self._demux(index, min(positions), max(positions))
        codec: Any = self._stream.codec_context
        # For H.264, a picture that no other one refers to can be left out without a trace in the others.
        may_skip = codec.name == "h264"
        try:
            for packet in [*packets, None]:
                self._check_stop()
                if may_skip and packet is not None:
                    codec.skip_frame = "DEFAULT" if number_of.get(packet.pts) in positions else "NONREF"
                for frame in codec.decode(packet):
                    number = number_of.get(frame.pts)
                    if number in positions:
                        if frame.is_corrupt:
                            raise _IndexDoubtedError
                        self._hand_over(frame, positions.pop(number), sink)
                        if not positions:
                            return
        finally:
            codec.skip_frame = "DEFAULT"
        raise _IndexDoubtedError

    def _hand_over(self, frame: Any, positions: list[int], sink: FrameSink) -> None:
        rgb = self._reformatter.reformat(frame, format="rgb24", threads=1)
        plane = rgb.planes[0]
        pixels = np.ndarray(
            (rgb.height, rgb.width, 3), np.uint8, buffer=memoryview(cast("Any", plane)), strides=(plane.line_size, 3, 1)
        )
        for position in positions:
            sink(position, pixels)

    def _demux(self, index: _FrameIndex, first: int, last: int) -> tuple[list[Any], dict[int, int]]:
        """Packets that are enough to decode frames `first` to `last`, and the number of the frame of each time stamp.

        The packets are held in memory in compressed form.
        """
        key = index.key_before(first)
        while True:
            packets: list[Any] = []
            group: _Group | None = None
            start = 0
            for packet in self._packets_from(index, key):
                if group is None:
                    start = index.find(packet)
                    group = _Group(packet.pts, index.num_shown_before(start))
                elif group.is_complete(until=last, dts=packet.dts):
                    break
                packets.append(packet)
                if not packet.is_discard:
                    group.add(packet.pts)
            if group is None:
                raise _IndexDoubtedError
            if start == 0 and group.num_leading:
                raise _IndexDoubtedError  # whether frames before the first key frame are shown is the decoder's choice
            if group.first_number <= first:
                return packets, group.numbers()
            # The first frames asked for are shown before this key frame: they belong to the group before.
            key = index.key_before(first, below=min(key, start))

    def _packets_from(self, index: _FrameIndex, key: int) -> Iterator[Any]:
        self._container.seek(index.seek_time(key), stream=self._stream, backward=True)
        for packet in self._container.demux(self._stream):
            self._check_stop()
            if packet.size:
                if packet.pts is None or packet.dts is None or packet.is_corrupt:
                    raise _IndexDoubtedError
                yield packet


class _DemuxerFile:
    """A file as a demuxer uses it: seeking to a place that cannot be, as damaged files suggest, fails quietly."""

    def __init__(self, file: io.RawIOBase) -> None:
        self.read = file.read
        self.tell = file.tell
        self._file = file

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        try:
            return self._file.seek(offset, whence)
        except (OSError, ValueError):
            return -1


class _Group:
    """Numbers of the frames from a key frame on, while their packets come in decoding order."""

    def __init__(self, key_time: int, num_before: int) -> None:
        """`num_before`: shown frames decoded before the key frame."""
        self._key_time, self._num_before = key_time, num_before
        self._times: list[int] = []
        self.num_leading = 0
        """Frames that are decoded after the key frame and shown before it."""

    def add(self, time: int) -> None:
        if time < self._key_time:
            self.num_leading += 1
            return
        at = bisect.bisect_left(self._times, time)
        if at < len(self._times) and self._times[at] == time:
            raise _IndexDoubtedError  # two frames with one time stamp
        self._times.insert(at, time)

    @property
    def first_number(self) -> int:
        """Number of the first frame shown from the key frame on."""
        return self._num_before + self.num_leading

    def is_complete(self, *, until: int, dts: int) -> bool:
        """Whether no packet from `dts` on can hold a frame up to number `until`: none is shown before it is decoded."""
        ahead = until - self.first_number
        return self._key_time < dts and (ahead < 0 or (ahead < len(self._times) and self._times[ahead] < dts))

    def numbers(self) -> dict[int, int]:
        return {time: self.first_number + offset for offset, time in enumerate(self._times)}


class _FrameIndex:
    """What a container says about its packets, in decoding order."""

    def __init__(self, entries: Sequence[tuple[int, int, bool, bool]], *, delay: int) -> None:
        """`entries`: (dts, byte position, is a key frame, is not shown); `delay`: usual pts - dts of a key frame."""
        self._entries = {(dts, position): number for number, (dts, position, _, _) in enumerate(entries)}
        self._times = [dts for dts, _, _, _ in entries]
        self._num_shown = np.concatenate([[0], np.cumsum([not hidden for _, _, _, hidden in entries])])
        self._keys = [number for number, (_, _, is_key, _) in enumerate(entries) if is_key]
        self._num_shown_at_key = [int(self._num_shown[key]) for key in self._keys]
        self._delay = delay
        is_ascending = all(before < after for before, after in itertools.pairwise(self._times))
        if not is_ascending or not self._keys or self._keys[0] != 0:
            raise _IndexDoubtedError

    @property
    def num_frames(self) -> int:
        return int(self._num_shown[-1])

    def num_shown_before(self, entry: int) -> int:
        return int(self._num_shown[entry])

    def key_before(self, frame: int, *, below: int | None = None) -> int:
        """The last key frame that a frame may need; the last such one before the entry `below`."""
        at = bisect.bisect_right(self._num_shown_at_key, frame) - 1
        if below is not None:
            at = min(at, bisect.bisect_left(self._keys, below) - 1)
        if at < 0:
            raise _IndexDoubtedError
        return self._keys[at]

    def seek_time(self, entry: int) -> int:
        return self._times[entry] + self._delay

    def find(self, packet: Any) -> int:
        """The entry of a key frame's packet."""
        entry = self._entries.get((packet.dts, packet.pos))
        if entry is None or not packet.is_keyframe:
            raise _IndexDoubtedError
        return entry


def _read_index(uri: str, container: Any, stream: Any, file: io.RawIOBase) -> _FrameIndex:
    """The index that an MP4 or QuickTime file begins or ends with."""
    is_mp4 = "mp4" in container.format.name
    codec = stream.codec_context.codec.canonical_name
    if not is_mp4 or codec not in _ONE_FRAME_PER_PACKET or _is_fragmented(file):
        raise _IndexDoubtedError
    entries = [(entry.timestamp, entry.pos, entry.is_keyframe, entry.is_discard) for entry in stream.index_entries]
    end = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
    if end > container.size:
        raise DataError(
            f"{uri}: cut off: {len(entries)} frames are listed up to byte {end}, and it has {container.size} bytes",
            hint="copy the file again, or remove it from the catalogue",
        )
    if not entries:
        raise _IndexDoubtedError
    return _FrameIndex(entries, delay=(stream.start_time or 0) - entries[0][0])


_ATTACHED_PICTURE = 0x0400
"""AV_DISPOSITION_ATTACHED_PIC: the cover of a song, say."""


def _is_fragmented(file: io.RawIOBase) -> bool:
    """Whether an MP4 has fragments (`moof` boxes), which its index says nothing about."""
    position, size = 0, file.seek(0, io.SEEK_END)
    while position + 8 <= size:
        file.seek(position)
        header = file.read(16) or b""
        if header[4:8] == b"moof":
            return True
        length = int.from_bytes(header[:4], "big")
        if length == 1:
            length = struct.unpack(">Q", header[8:16])[0]
        if length < 8:  # up to the end of the file
            break
        position += length
    return False


def _positions(indices: Sequence[int]) -> dict[int, list[int]]:
    """Number of a frame → its positions in the request."""
    positions: dict[int, list[int]] = {}
    for position, index in enumerate(indices):
        positions.setdefault(index, []).append(position)
    return positions


def _describe(head: bytes) -> str:
    """What the first bytes of a file look like."""
    if not head:
        return "the file is empty"
    if head[4:8] in (b"ftyp", b"moov", b"mdat"):
        return "it begins like an MP4 file"
    if head.startswith((b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF")):
        return "it begins like an image" if head[:4] != b"RIFF" or head[8:12] == b"WEBP" else "it begins like RIFF"
    if head.isascii() and all(byte >= 32 or byte in b"\t\r\n" for byte in head):
        return f"it begins with the text {head.decode()!r}"
    return "it begins like no known format"
