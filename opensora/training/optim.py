"""AdamW over local shards, gradient clipping, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from opensora.acceleration.sharding import like_shard, local_shard
from opensora.config.train import OptimConfig


def learning_rate(step: int, config: OptimConfig, *, total_steps: int | None) -> float:
    """The rate of a step: linear warm-up, then constant, or falling to `min_lr` at the last step.

    Args:
        step: number of optimiser steps done so far.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return config.lr
    assert total_steps is not None, "the config refuses a falling rate without train.steps"
    done = (step - config.warmup_steps) / max(1, total_steps - 1 - config.warmup_steps)
    share = min(1.0, done)
    fall = 0.5 * (1 - math.cos(math.pi * share)) if config.schedule == "cosine" else share
    return config.lr + (config.min_lr - config.lr) * fall


class ShardedAdamW:
    """torch's AdamW on this rank's shards. It is element-wise, so that shards give what the whole would.

    Working below DTensor saves its dispatch on every operation of every parameter, which for small models costs
    more than the arithmetic.
    """

    def __init__(self, parameters: Mapping[str, Tensor], config: OptimConfig) -> None:
        self._config = config
        self._parameters = dict(parameters)
        self._shards = {name: local_shard(parameter) for name, parameter in self._parameters.items()}
        self._adamw = torch.optim.AdamW(
            [shard for shard in self._shards.values() if shard.numel()] or [torch.zeros(1)],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self._num_updates = 0
        # The state exists from the start, so that a checkpoint can be loaded into it in place.
        for shard in self._shards.values():
            self._adamw.state[shard] = {
                "step": torch.zeros((), dtype=torch.float32, device=shard.device),
                "exp_avg": torch.zeros_like(shard),
                "exp_avg_sq": torch.zeros_like(shard),
            }

    def gradients(self) -> list[Tensor]:
        """This rank's parts of the gradients that exist."""
        return [local_shard(p.grad) for p in self._parameters.values() if p.grad is not None]

    @torch.no_grad()
    def squared_gradient_norm(self) -> float:
        """Sum of squares over this rank's shards, before `scale` of `step`."""
        gradients = [gradient for gradient in self.gradients() if gradient.numel()]
        if not gradients:
            return 0.0
        norms = torch.stack(torch._foreach_norm(gradients))
        return float(norms.double().square().sum())

    @torch.no_grad()
    def step(self, *, lr: float, scale: float) -> None:
        """Multiply the gradients by `scale`, update the weights and drop the gradients."""
        torch._foreach_mul_(self.gradients(), scale)
        for name, parameter in self._parameters.items():
            self._shards[name].grad = None if parameter.grad is None else local_shard(parameter.grad)
        self._adamw.param_groups[0]["lr"] = lr
        self._adamw.step()
        self._num_updates += 1
        self.zero_grad()

    def zero_grad(self) -> None:
        for name, parameter in self._parameters.items():
            parameter.grad = None
            self._shards[name].grad = None

    def tensors(self) -> dict[str, Tensor]:
        """Name → state, with global shapes and placements; memory is shared."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            state = self._adamw.state[self._shards[name]]
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{moment}.{name}"] = like_shard(state[moment], parameter)
        return tensors

    @property
    def num_updates(self) -> int:
        """How often the weights were updated, on which AdamW's bias correction depends."""
        return self._num_updates

    @num_updates.setter
    def num_updates(self, count: int) -> None:
        self._num_updates = count
        for shard in self._shards.values():
            self._adamw.state[shard]["step"].fill_(count)
