"""What a checkpoint holds: one flat set of named tensors, and a few facts."""

from __future__ import annotations

from torch import Tensor, nn

from opensora.acceleration.activation_checkpoint import WRAPPER_PREFIX
from opensora.training.ema import EMA
from opensora.training.optim import ShardedAdamW

MODEL_PREFIX = "model."
EMA_PREFIX = "ema."
OPTIM_PREFIX = "optim."


def published_name(name: str) -> str:
    """A parameter's name without what activation checkpointing has added."""
    return name.replace(WRAPPER_PREFIX, "")


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Published name → parameter, frozen ones left out."""
    return {published_name(name): p for name, p in model.named_parameters() if p.requires_grad}


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Published name → parameter or persistent buffer; memory is shared with the model."""
    return {published_name(name): tensor for name, tensor in model.state_dict().items()}


def checkpoint_tensors(model: nn.Module, optimizer: ShardedAdamW, ema: EMA | None) -> dict[str, Tensor]:
    """Everything to save or to load in place: `model.*`, `optim.*` and, where kept, `ema.*`."""
    return {
        **{MODEL_PREFIX + name: tensor for name, tensor in model_tensors(model).items()},
        **{OPTIM_PREFIX + name: tensor for name, tensor in optimizer.tensors().items()},
        **{EMA_PREFIX + name: tensor for name, tensor in (ema.tensors() if ema else {}).items()},
    }


def exported_tensors(model: nn.Module, ema: EMA | None) -> dict[str, Tensor]:
    """The weights to publish: averages where they are kept, the model's own elsewhere."""
    return {**model_tensors(model), **(ema.tensors() if ema else {})}
