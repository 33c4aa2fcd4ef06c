"""Open-Sora's `prepare_dataloader`, for scripts that loop over a `DataLoader`. A run reads through `StepLoader`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, default_collate

from opensora.datasets.datasets import VariableVideoTextDataset, VideoTextDataset
from opensora.datasets.sampler import StatefulDistributedSampler, VariableVideoBatchSampler
from opensora.errors import ConfigError


def prepare_dataloader(
    dataset: VideoTextDataset | VariableVideoTextDataset,
    batch_size: int | None = None,
    shuffle: bool = False,
    seed: int = 1024,
    drop_last: bool = False,
    pin_memory: bool = False,
    num_workers: int = 0,
    process_group: dist.ProcessGroup | None = None,
    bucket_config: Mapping[str, Mapping[int, Any]] | None = None,
    num_bucket_build_workers: int = 1,
    **settings: Any,
) -> tuple[DataLoader[dict[str, Any]], StatefulDistributedSampler | VariableVideoBatchSampler]:
    """A loader of one rank's batches, and the sampler that says which.

    Args:
        dataset: with variable sizes it takes `bucket_config`, else `batch_size`.
        shuffle, drop_last: see the samplers.
        seed: of the order, the buckets and the frames that are drawn.
        pin_memory, num_workers: as in `DataLoader`. What is drawn does not depend on the workers.
        process_group: of the data-parallel ranks, so that ranks of a sequence-parallel group get the same clips; all
            ranks unless given, and one where torch.distributed is not initialised.
        num_bucket_build_workers: taken for compatibility; buckets are assigned in one go, a second per million rows.
        settings: others of `DataLoader`, such as `prefetch_factor`.

    Raises:
        ConfigError: `batch_size` or `bucket_config` does not go with the data set; or workers shall outlive an epoch,
            whose draws they would keep.
    """
    if settings.get("persistent_workers"):
        raise ConfigError(
            "persistent_workers=True: workers would draw the frames of their first epoch again and again",
            hint="leave it out: workers start anew with each epoch",
        )
    num_replicas, rank = 1, 0
    if dist.is_available() and dist.is_initialized():
        num_replicas, rank = dist.get_world_size(process_group), dist.get_rank(process_group)
    dataset.seed = seed
    settings = {"num_workers": num_workers, "pin_memory": pin_memory, "collate_fn": _collate, **settings}
    if isinstance(dataset, VariableVideoTextDataset):
        if bucket_config is None or batch_size is not None:
            raise ConfigError(
                f"batch_size={batch_size}, bucket_config={bucket_config}: clips of variable size need a bucket table",
                hint="pass bucket_config and leave batch_size out",
            )
        batches = VariableVideoBatchSampler(dataset, bucket_config, num_replicas, rank, shuffle, seed, drop_last)
        return DataLoader(dataset, batch_sampler=batches, **settings), batches
    if not isinstance(dataset, VideoTextDataset):
        raise ConfigError(
            f"{type(dataset).__name__} is no data set of Open-Sora's",
            hint="use VideoTextDataset or VariableVideoTextDataset, or torch's own DataLoader",
        )
    if batch_size is None or bucket_config is not None:
        raise ConfigError(
            f"batch_size={batch_size}, bucket_config={bucket_config}: clips of one size need a batch size",
            hint="pass batch_size and leave bucket_config out",
        )
    rows = StatefulDistributedSampler(
        dataset, batch_size=batch_size, num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed
    )
    return DataLoader(dataset, batch_size=batch_size, sampler=rows, drop_last=drop_last, **settings), rows


def _collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """torch's collate; text features are packed along their tokens, [1, sum of lengths, C], with a list of lengths."""
    if "mask" not in items[0]:
        return dict(default_collate(items))
    texts = torch.cat([item.pop("text") for item in items], dim=1)
    lengths = [item.pop("mask") for item in items]
    return {**default_collate(items), "text": texts, "mask": lengths}
