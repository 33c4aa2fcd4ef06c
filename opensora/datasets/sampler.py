"""Open-Sora's samplers, for scripts that loop over a `DataLoader`. A run is dealt by `opensora.datasets.plan`.

Here the number of ranks decides which clips share a step, and in a step each rank has a bucket of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DistributedSampler, Sampler

from opensora.datasets.bucket import Bucket
from opensora.datasets.datasets import VariableVideoTextDataset, VideoTextDataset
from opensora.errors import ConfigError, DataError


class StatefulDistributedSampler(DistributedSampler[Any]):
    """Row numbers for one rank of a `VideoTextDataset`; an interrupted epoch goes on behind its last batch.

    Args:
        batch_size: clips that a rank takes per step: what turns steps into rows.
    """

    dataset: VideoTextDataset

    def __init__(self, dataset: VideoTextDataset, *, batch_size: int, **settings: Any) -> None:
        super().__init__(dataset, **settings)
        self._batch_size = batch_size
        self.start_index = 0
        """Rows of this rank that the epoch has had."""

    def __iter__(self) -> Iterator[int]:
        return iter(list(super().__iter__())[self.start_index :])

    def __len__(self) -> int:
        return self.num_samples - self.start_index

    def set_epoch(self, epoch: int) -> None:
        """Choose the order, and the draws of the clips, of another epoch."""
        super().set_epoch(epoch)
        self.dataset.epoch = epoch

    def reset(self) -> None:
        """Start the epoch from its beginning."""
        self.start_index = 0

    def state_dict(self, num_steps: int) -> dict[str, int]:
        """Where the epoch is after this many of its steps."""
        return {"start_index": num_steps * self._batch_size}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Go on where `state_dict` was taken."""
        self.start_index = state_dict["start_index"]


class VariableVideoBatchSampler(Sampler[list[str]]):
    """Batches of "row-T-H-W" for one rank, each of one bucket.

    An epoch: rows go to buckets (draws seeded with `seed + epoch + row · len(bucket)`); each bucket is shuffled and cut
    into batches; the batches' buckets are shuffled. Step i gives rank r the batch i · num_replicas + r.

    Args:
        bucket_config: resolution → frames → (probability, batch size).
        num_replicas: data-parallel ranks.
        rank: which of them this is.
        shuffle: else buckets follow each other in the order in which rows first fall into them.
        seed: of the draws and the order.
        drop_last: drop what fills no batch and no step; else repeat clips of the bucket, and batches of the epoch.

    Raises:
        ConfigError: the table makes no sense.
    """

    def __init__(
        self,
        dataset: VariableVideoTextDataset,
        bucket_config: Mapping[str, Mapping[int, Any]],
        num_replicas: int = 1,
        rank: int = 0,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        self.dataset = dataset
        self.bucket = Bucket(bucket_config)
        self.num_replicas = num_replicas
        self.rank = rank
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.epoch = 0
        self.last_micro_batch_access_index = 0
        """Batches, over all ranks, that the epoch has had."""

    def __iter__(self) -> Iterator[list[str]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        batches = {}
        for shape, rows in self._group().items():
            batches[shape] = self._cut(rows, self.bucket.entries[shape].batch_size, generator)
        accesses = [shape for shape, cut in batches.items() for _ in cut]
        if not accesses:
            raise DataError(
                f"no bucket gets a full batch from the {len(self.dataset)} rows of {self.dataset.catalogue.uri}",
                hint="use smaller buckets or batch sizes, or drop_last=False",
            )
        if self.shuffle:
            accesses = [accesses[at] for at in torch.randperm(len(accesses), generator=generator).tolist()]
        rest = len(accesses) % self.num_replicas
        if rest and self.drop_last:
            accesses = accesses[:-rest]
        elif rest:
            repeats = -(-self.num_replicas // len(accesses))
            accesses += (accesses * repeats)[: self.num_replicas - rest]

        first_step = self.last_micro_batch_access_index // self.num_replicas
        num_taken = dict.fromkeys(batches, 0)
        for at, shape in enumerate(accesses):
            # A repeated access begins its bucket anew.
            batch = batches[shape][num_taken[shape] % len(batches[shape])]
            num_taken[shape] += 1
            step, rank = divmod(at, self.num_replicas)
            if step >= first_step and rank == self.rank:
                entry = self.bucket.entries[shape]
                self.last_micro_batch_access_index = (step + 1) * self.num_replicas
                yield [f"{row}-{entry.num_frames}-{entry.height}-{entry.width}" for row in batch]
        self.reset()

    def __len__(self) -> int:
        """Steps of the whole epoch."""
        num_batches = 0
        for shape, rows in self._group().items():
            batch_size = self.bucket.entries[shape].batch_size
            num_batches += len(rows) // batch_size if self.drop_last else -(-len(rows) // batch_size)
        return num_batches // self.num_replicas if self.drop_last else -(-num_batches // self.num_replicas)

    def set_epoch(self, epoch: int) -> None:
        """Choose the buckets, the order and the draws of the clips of another epoch."""
        self.epoch = self.dataset.epoch = epoch

    def reset(self) -> None:
        """Start the epoch from its beginning."""
        self.last_micro_batch_access_index = 0

    def state_dict(self, num_steps: int) -> dict[str, int]:
        """Where the run is after this many steps of the epoch. The caller counts: a loader reads ahead."""
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "last_micro_batch_access_index": num_steps * self.num_replicas,
        }

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Go on where `state_dict` was taken, on any number of ranks (the step is rounded down)."""
        unknown = set(state_dict) - {"seed", "epoch", "last_micro_batch_access_index"}
        if unknown:
            raise ConfigError(
                f"a sampler's state has no {', '.join(sorted(unknown))}", hint="pass what state_dict gave"
            )
        self.seed = self.dataset.seed = state_dict["seed"]
        self.last_micro_batch_access_index = state_dict["last_micro_batch_access_index"]
        self.set_epoch(state_dict["epoch"])

    def _group(self) -> dict[int, NDArray[np.int64]]:
        """Shape → its rows in order; shapes in the order of their first row."""
        catalogue = self.dataset.catalogue
        assigned = self.bucket.assign(
            catalogue.num_frames,
            catalogue.height,
            catalogue.width,
            catalogue.ids,
            seed=self.seed,
            epoch=self.epoch,
            frame_interval=self.dataset.frame_interval,
        )
        shapes, first = np.unique(assigned, return_index=True)
        in_order = shapes[np.argsort(first)]
        return {int(shape): np.flatnonzero(assigned == shape) for shape in in_order if shape >= 0}

    def _cut(self, rows: NDArray[np.int64], batch_size: int, generator: torch.Generator) -> list[list[int]]:
        """Batches of a bucket."""
        clips = rows.tolist()
        rest = len(clips) % batch_size
        if rest and self.drop_last:
            clips = clips[:-rest]
        elif rest:
            clips += clips[: batch_size - rest]
        if self.shuffle:
            clips = [clips[at] for at in torch.randperm(len(clips), generator=generator).tolist()]
        return [clips[at : at + batch_size] for at in range(0, len(clips), batch_size)]
