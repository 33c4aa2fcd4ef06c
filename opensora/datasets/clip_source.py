"""One clip of a catalogue, as the model gets it: read, sampled and transformed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from opensora.config.train import DataConfig, StorageConfig
from opensora.datasets.cache import ClipCache
from opensora.datasets.catalogue import Catalogue
from opensora.datasets.reader import IMAGE_FPS, ReadingStoppedError, Video, is_image, read_image
from opensora.datasets.transforms import ClipTransform
from opensora.errors import DataError, ObjectNotFoundError
from opensora.randomness import rng
from opensora.storage import Storage, locate

logger = logging.getLogger(__name__)


class ClipSource:
    """Reads a row of the catalogue. Used by several threads."""

    def __init__(self, catalogue: Catalogue, *, data: DataConfig, seed: int, storage: StorageConfig) -> None:
        self._catalogue = catalogue
        self._data = data
        self._seed = seed
        self._storage = storage
        self._cache = None
        if data.cache_dir is not None:
            self._cache = ClipCache(Path(data.cache_dir), limit_bytes=int(data.cache_gib * 2**30))

    def read(
        self, row: int, epoch: int, out: NDArray[np.float32], should_stop: Callable[[], bool] = lambda: False
    ) -> float:
        """Fill `out` [3, T, H, W] with a clip of that size; returns the frame rate that the model is told.

        Raises:
            DataError, ObjectNotFoundError: the clip is bad.
            StorageError: the store does not answer.
            ReadingStoppedError: `should_stop` said yes.
        """
        if should_stop():
            raise ReadingStoppedError(self._catalogue.row_path(row))
        storage, path = locate(self._catalogue.row_path(row), config=self._storage)
        if self._cache is not None:
            copy_storage, copy_path = self._cache.find(storage, path)
            if copy_storage is not storage:
                try:
                    return self._read(copy_storage, copy_path, row, epoch, out, should_stop)
                except ObjectNotFoundError:
                    logger.debug("the copy of %s was dropped before it was read", storage.uri_of(path))
                except DataError as error:
                    raise DataError(f"{storage.uri_of(path)}: {error.message}", hint=error.hint) from error
        return self._read(storage, path, row, epoch, out, should_stop)

    def _read(
        self,
        storage: Storage,
        path: str,
        row: int,
        epoch: int,
        out: NDArray[np.float32],
        should_stop: Callable[[], bool],
    ) -> float:
        _, num_frames, height, width = out.shape
        transform = ClipTransform(self._data.transform, height=height, width=width)
        if is_image(storage.uri_of(path)):
            if num_frames != 1:
                raise DataError(
                    f"{storage.uri_of(path)}: an image, and {num_frames} frames are needed",
                    hint="images have num_frames=1 in the catalogue",
                )
            transform.image(read_image(storage, path), out[:, 0])
            return IMAGE_FPS
        draws = rng(self._seed, epoch=epoch, row=int(self._catalogue.ids[row]), purpose="frames")
        with Video(storage, path, should_stop=should_stop) as video:
            video.read_sampled(
                num_frames=num_frames,
                frame_interval=self._data.frame_interval,
                rng=draws,
                sink=lambda at, frame: transform.frame(frame, out[:, at]),
            )
            return video.fps // self._data.frame_interval
