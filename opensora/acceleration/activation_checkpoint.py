"""Activation checkpointing: keep a block's input, compute the rest again in the backward pass (Chen et al., 2016)."""

from __future__ import annotations

from typing import Literal

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

WRAPPER_PREFIX = "_checkpoint_wrapped_module."
"""What wrapping adds to parameter names; checkpoints and exports leave it out."""


def checkpoint_blocks(blocks: dict[str, nn.ModuleList], mode: Literal["none", "full"]) -> None:
    """Wrap every block in place, before sharding.

    Args:
        blocks: the model's lists of blocks, by name.
    """
    if mode == "none":
        return
    for stack in blocks.values():
        for index, block in enumerate(stack):
            stack[index] = checkpoint_wrapper(block)
