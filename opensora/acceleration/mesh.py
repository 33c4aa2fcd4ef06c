"""The ranks of a run: process groups, device and device mesh.

One rank needs no launcher and takes the same path as many, so that there is one way through the trainer.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import (  # type: ignore[attr-defined]  # public, not listed in __all__
    HashStore,
    PrefixStore,
    Store,
    rendezvous,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from opensora.config.train import ParallelConfig
from opensora.errors import ConfigError, NodeUnhealthyError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This rank's place among all ranks."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    """Dimensions `replicate` (hybrid sharding only) and `shard`."""
    replicas: int
    control: dist.ProcessGroup
    """gloo: agreements of a few numbers per step, on the CPU whatever the device."""
    saving: dist.ProcessGroup
    """gloo: used by the thread that saves, so that it never meets the step's collectives."""
    store: Store
    """Where the ranks have met. A thread uses a clone."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Add numbers up over all ranks, in fp64."""
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.control)
        return tensor.tolist()

    def max(self, values: Sequence[int]) -> list[int]:
        """The largest of each number over all ranks."""
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.control)
        return tensor.tolist()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return bool(self.max([flag])[0])

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank."""
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values  # type: ignore[return-value]  # all_gather_object has filled every place

    def broadcast(self, value: T | None) -> T:
        """Rank 0's value, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]  # type: ignore[return-value]  # rank 0 passes a value

    def barrier(self) -> None:
        dist.barrier(group=self.control)

    def close(self) -> None:
        """Leave the process groups. All ranks must call it: leaving while a peer still talks kills that peer."""
        dist.barrier(group=self.control)
        dist.destroy_process_group()


def choose_device(name: str) -> torch.device:
    """The device of a run.

    Raises:
        ConfigError: a GPU was asked for and there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device='cuda', but PyTorch sees no GPU", hint="use device=cpu or device=auto")
    return torch.device(name, int(os.environ.get("LOCAL_RANK", "0"))) if name == "cuda" else torch.device(name)


def init_world(parallel: ParallelConfig, *, device: str) -> World:
    """Join the other ranks, as named by RANK, WORLD_SIZE and MASTER_*; alone when they are not set.

    Raises:
        ConfigError: the number of ranks is not a multiple of the replicas.
        NodeUnhealthyError: the GPU does not answer.
    """
    chosen = choose_device(device)
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if size % parallel.replicas:
        raise ConfigError(
            f"parallel.replicas={parallel.replicas} does not divide the {size} ranks",
            hint="choose a divisor of the number of ranks",
        )
    if chosen.type == "cuda":
        try:
            torch.cuda.set_device(chosen)
            torch.zeros(1, device=chosen)
        except RuntimeError as error:
            raise NodeUnhealthyError(f"rank {rank}: {chosen} does not answer: {error}") from error
    torch.set_num_threads(parallel.num_cpu_threads or _cores_per_rank())
    timeout = timedelta(seconds=parallel.collective_timeout_seconds)
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    if size == 1 and "MASTER_ADDR" not in os.environ:
        store: Store = HashStore()
    else:
        store, rank, size = next(rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    groups = PrefixStore("groups", store)
    dist.init_process_group(backend, store=groups, rank=rank, world_size=size, timeout=timeout)
    if parallel.replicas > 1:
        shape, names = (parallel.replicas, size // parallel.replicas), ("replicate", "shard")
        mesh = init_device_mesh(chosen.type, shape, mesh_dim_names=names)
    else:
        mesh = init_device_mesh(chosen.type, (size,), mesh_dim_names=("shard",))
    return World(
        rank=rank,
        size=size,
        device=chosen,
        mesh=mesh,
        replicas=parallel.replicas,
        control=_gloo_group(timeout),
        saving=_gloo_group(timeout),
        store=store,
    )


def _gloo_group(timeout: timedelta) -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(group, dist.ProcessGroup)
    return group


def _cores_per_rank() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
