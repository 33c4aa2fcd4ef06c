"""Sharding with FSDP2: fp32 master shards, low-precision compute, gradients summed over all ranks.

Collectives add up and divide nothing: the trainer divides once, by what the whole step really read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from opensora.acceleration.mesh import World


def shard_model(
    model: nn.Module,
    blocks: dict[str, nn.ModuleList],
    *,
    world: World,
    sharding: Literal["zero2", "zero3"],
    compute_dtype: torch.dtype,
) -> None:
    """Shard each block and the rest of the model in place.

    Args:
        model: holds its parameters in the master type (fp32, or fp64).
        blocks: the units of gathering.
        compute_dtype: type of the gathered weights; gradients are reduced in the master type.
    """
    master_dtype = next(model.parameters()).dtype
    policy = MixedPrecisionPolicy(
        param_dtype=None if compute_dtype == master_dtype else compute_dtype,
        reduce_dtype=master_dtype,
        # The model casts what it needs: times, sizes and frame rates must stay in fp32.
        cast_forward_inputs=False,
    )
    units = [*(block for stack in blocks.values() for block in stack), model]
    for unit in units:
        fully_shard(unit, mesh=world.mesh, reshard_after_forward=sharding == "zero3", mp_policy=policy)
    for module in sharded_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def sharded_modules(model: nn.Module) -> Iterator[FSDPModule]:
    """All units of gathering."""
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def free_gathered_weights(model: nn.Module) -> None:
    """Drop gathered weights that a forward pass without backward has left: the next one must see the new ones."""
    for module in sharded_modules(model):
        module.reshard()


def local_shard(tensor: Tensor) -> Tensor:
    """This rank's part, sharing memory with the whole, without gradient tracking."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like_shard(local: Tensor, whole: Tensor) -> Tensor:
    """Give a local part the global shape and placement of `whole`; memory is shared."""
    if not isinstance(whole, DTensor):
        return local
    return DTensor.from_local(
        local, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )
