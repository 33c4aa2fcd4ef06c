"""Open-Sora's map-style data sets, for scripts that loop over a `DataLoader`. A run reads through `StepLoader`.

Both read with the parts of the run: catalogue, reader, transforms, and draws that belong to (seed, epoch, row). A clip
that cannot be read is a DataError that names it; another clip never takes its place.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from opensora.config.train import DataConfig, StorageConfig
from opensora.datasets.catalogue import load_catalogue
from opensora.datasets.clip_source import ClipSource
from opensora.datasets.reader import IMAGE_FPS, Video, is_image, read_image
from opensora.datasets.transforms import ClipTransform
from opensora.errors import ConfigError, DataError
from opensora.randomness import rng
from opensora.storage import locate

TransformName = Literal["resize_crop", "center"]
DUMMY_TEXT_SHAPE = (1, 50, 1152)
"""[1, tokens, channels] of the text that `dummy_text_feature` gives in place of captions."""


class _CatalogueDataset(Dataset[dict[str, Any]]):
    """The rows of a catalogue.

    Args:
        data_path: CSV or Parquet file, local or in a bucket.
        frame_interval: every n-th frame of a video is used.
        transform_name: `resize_crop` or `center`.
        root: what relative paths start from; the catalogue's folder unless given.

    Raises:
        ConfigError: there is no `data_path`.
        DataError: the catalogue is damaged or has no usable row.
    """

    def __init__(self, data_path: str | None, frame_interval: int, transform_name: str | None, root: str | None):
        if data_path is None:
            raise ConfigError("data_path=None: there is nothing to read", hint="give a CSV or Parquet file")
        self.catalogue = load_catalogue(data_path, root=root)
        self.frame_interval = frame_interval
        self.transform_name = transform_name
        self.seed = 0
        """Of the draws; set by `prepare_dataloader`."""
        self.epoch = 0
        """Of the draws; set by the sampler's `set_epoch`."""

    def __len__(self) -> int:
        return len(self.catalogue)

    def _transform(self) -> TransformName:
        if self.transform_name is None:
            raise ConfigError("transform_name=None: clips have no common size", hint="use resize_crop or center")
        return cast("TransformName", self.transform_name)


class VideoTextDataset(_CatalogueDataset):
    """Clips of one size. An item: `video` fp32 [3, T, H, W] in [-1, 1], `fps` of the container, `text`.

    An image is repeated `num_frames` times, and its `fps` is 120.
    """

    def __init__(
        self,
        data_path: str | None = None,
        num_frames: int = 16,
        frame_interval: int = 1,
        image_size: tuple[int, int] = (256, 256),
        transform_name: str | None = "center",
        root: str | None = None,
    ) -> None:
        super().__init__(data_path, frame_interval, transform_name, root)
        self.num_frames = num_frames
        self.image_size = image_size

    def __getitem__(self, index: int) -> dict[str, Any]:
        height, width = self.image_size
        transform = ClipTransform(self._transform(), height=height, width=width)
        video = torch.empty(3, self.num_frames, height, width)
        pixels = video.numpy()
        storage, path = locate(self.catalogue.row_path(index))
        if is_image(path):
            transform.image(read_image(storage, path), pixels[:, 0])
            pixels[:, 1:] = pixels[:, :1]
            return {"video": video, "fps": IMAGE_FPS, "text": self.catalogue.row_text(index)}
        draws = rng(self.seed, epoch=self.epoch, row=int(self.catalogue.ids[index]), purpose="frames")
        with Video(storage, path) as source:
            source.read_sampled(
                num_frames=self.num_frames,
                frame_interval=self.frame_interval,
                rng=draws,
                sink=lambda at, frame: transform.frame(frame, pixels[:, at]),
            )
            return {"video": video, "fps": source.fps, "text": self.catalogue.row_text(index)}


class VariableVideoTextDataset(_CatalogueDataset):
    """Clips of the sizes that a bucket table gives them. The index is "row-T-H-W", as the sampler writes it.

    An item: `video` fp32 [3, T, H, W] in [-1, 1], `num_frames`, `height`, `width`, `ar` (height / width), `fps` (of the
    container // frame interval; 120 for images), `text`; with `dummy_text_feature`, `text` is zeros [1, 50, 1152] and
    `mask` their number of tokens.

    `num_frames` and `image_size` are taken for compatibility: the index says both.
    """

    def __init__(
        self,
        data_path: str | None = None,
        num_frames: int | None = None,
        frame_interval: int = 1,
        image_size: tuple[int | None, int | None] = (None, None),
        transform_name: str | None = None,
        dummy_text_feature: bool = False,
        root: str | None = None,
    ) -> None:
        super().__init__(data_path, frame_interval, transform_name, root)
        if num_frames is not None or image_size != (None, None):
            raise ConfigError(
                f"num_frames={num_frames}, image_size={image_size}: this data set takes sizes from the bucket table",
                hint="leave them out, or use VideoTextDataset for clips of one size",
            )
        self.dummy_text_feature = dummy_text_feature

    def __getitem__(self, index: str) -> dict[str, Any]:
        try:
            row, num_frames, height, width = (int(part) for part in index.split("-"))
        except (AttributeError, ValueError):
            raise DataError(
                f"index {index!r} is not row-T-H-W", hint="take the indices from the sampler of prepare_dataloader"
            ) from None
        data = DataConfig(path=self.catalogue.uri, frame_interval=self.frame_interval, transform=self._transform())
        source = ClipSource(self.catalogue, data=data, seed=self.seed, storage=StorageConfig())
        video = torch.empty(3, num_frames, height, width)
        fps = source.read(row, self.epoch, video.numpy())
        item: dict[str, Any] = {
            "video": video,
            "num_frames": num_frames,
            "height": height,
            "width": width,
            "ar": height / width,
            "fps": fps,
        }
        if not self.dummy_text_feature:
            return {**item, "text": self.catalogue.row_text(row)}
        text: Tensor = torch.zeros(DUMMY_TEXT_SHAPE)
        return {**item, "text": text, "mask": DUMMY_TEXT_SHAPE[1]}
