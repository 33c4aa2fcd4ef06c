"""Clips: catalogue, buckets, plan of an epoch (all without torch), and reading.

The names that scripts written for Open-Sora import from here are found on first use, so that importing a torch-free
module of this package, such as the plan, loads no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_ATTRIBUTES = {
    "Bucket": "opensora.datasets.bucket:Bucket",
    "get_closest_ratio": "opensora.datasets.aspect:get_closest_ratio",
    "get_image_size": "opensora.datasets.aspect:get_image_size",
    "get_num_frames": "opensora.datasets.aspect:get_num_frames",
    "get_num_pixels": "opensora.datasets.aspect:get_num_pixels",
    "VariableVideoTextDataset": "opensora.datasets.datasets:VariableVideoTextDataset",
    "VideoTextDataset": "opensora.datasets.datasets:VideoTextDataset",
    "prepare_dataloader": "opensora.datasets.dataloader:prepare_dataloader",
    "read_from_path": "opensora.datasets.reader:read_from_path",
    # Lives above this package; here by name only, as in the registry.
    "save_sample": "opensora.sampling.video_io:save_sample",
}


def __getattr__(name: str) -> Any:
    if name not in _ATTRIBUTES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _ATTRIBUTES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *_ATTRIBUTES])
