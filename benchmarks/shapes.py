"""Rows for the benchmarks of planning: `shapes.csv` has frames, height, width and share of each kind of clip.

The mixture follows the data sets that Open-Sora was trained on: Webvid (336 x 596, about 18 s), Panda-70M (mostly
720p, 8 s), stock footage up to 4K in both orientations, and generated pictures and photographs.
"""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv

from opensora.datasets.catalogue import Catalogue

STAGE3 = {
    "144p": {1: (1.0, 475), 51: (1.0, 51), 102: (1.0, 27), 204: (1.0, 13), 408: (1.0, 6)},
    "256": {1: (1.0, 297), 51: (0.5, 20), 102: (0.5, 10), 204: (0.5, 5), 408: ((0.5, 0.5), 2)},
    "240p": {1: (1.0, 297), 51: (0.5, 20), 102: (0.5, 10), 204: (0.5, 5), 408: ((0.5, 0.4), 2)},
    "360p": {1: (1.0, 141), 51: (0.5, 8), 102: (0.5, 4), 204: (0.5, 2), 408: ((0.5, 0.3), 1)},
    "512": {1: (1.0, 141), 51: (0.5, 8), 102: (0.5, 4), 204: (0.5, 2), 408: ((0.5, 0.2), 1)},
    "480p": {1: (1.0, 89), 51: (0.5, 5), 102: (0.5, 3), 204: ((0.5, 0.5), 1), 408: (0.0, None)},
    "720p": {1: (0.3, 36), 51: (0.2, 2), 102: (0.1, 1), 204: (0.0, None)},
    "1024": {1: (0.3, 36), 51: (0.1, 2), 102: (0.1, 1), 204: (0.0, None)},
    "1080p": {1: (0.1, 5)},
    "2048": {1: (0.05, 5)},
}
"""The bucket table of Open-Sora 1.2's third stage."""


def synthetic_catalogue(num_rows: int, *, seed: int = 0) -> Catalogue:
    """Rows drawn from the mixture; there are no files behind them."""
    table = pa.csv.read_csv(Path(__file__).with_name("shapes.csv"))
    shares = table["share"].to_numpy()
    kinds = np.random.default_rng(seed).choice(len(shares), num_rows, p=shares / shares.sum())
    frames, height, width = (
        table[name].to_numpy().astype(np.int32)[kinds] for name in ("num_frames", "height", "width")
    )
    nothing = pa.chunked_array([pa.array([], pa.string())])
    return Catalogue(
        uri="synthetic",
        digest=f"synthetic {num_rows} {seed}",
        ids=np.arange(num_rows),
        num_frames=frames,
        height=height,
        width=width,
        fps=np.full(num_rows, np.nan, np.float32),
        paths=nothing,
        texts=nothing,
        root="",
        num_file_rows=num_rows,
        dropped={},
        num_empty_texts=num_rows,
        num_duplicates=0,
    )


def machine() -> str:
    """What a table of measurements was made on."""
    load = os.getloadavg()[0]
    return (
        f"{os.cpu_count()} cores ({platform.machine()}), load {load:.1f}, Python {platform.python_version()}, "
        f"numpy {version('numpy')}, pyarrow {version('pyarrow')}"
    )
