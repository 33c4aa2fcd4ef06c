"""Moving average of the weights, sharded exactly as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from opensora.acceleration.sharding import like_shard, local_shard


class EMA:
    """ema ← decay · ema + (1 − decay) · weights, over the local shards of the trainable parameters."""

    def __init__(self, parameters: Mapping[str, Tensor], *, decay: float) -> None:
        self.decay = decay
        self._parameters = dict(parameters)
        self._weights = [local_shard(parameter) for parameter in self._parameters.values()]
        self._averages = [weight.clone() for weight in self._weights]

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(self._averages, self._weights, 1 - self.decay)

    def tensors(self) -> dict[str, Tensor]:
        """Name → average, with the global shape and placement of its parameter; memory is shared."""
        return {
            name: like_shard(average, parameter)
            for (name, parameter), average in zip(self._parameters.items(), self._averages, strict=True)
        }

    @torch.no_grad()
    def restart(self) -> None:
        """Begin again from the present weights."""
        torch._foreach_copy_(self._averages, self._weights)

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Within the block the model computes with the averages."""
        kept = [weight.clone() for weight in self._weights]
        torch._foreach_copy_(self._weights, self._averages)
        try:
            yield
        finally:
            torch._foreach_copy_(self._weights, kept)
