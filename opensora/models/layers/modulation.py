"""Adaptive layer norm: the time embedding shifts, scales and gates what a block does.

Every modulation has a frame axis, `[B, F, ..., C]` with F = 1, or F = T when frames differ in their time (conditioning
frames are at time 0). So a mask over frames selects small vectors, and no block computes anything twice.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name

from opensora.errors import ConfigError


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`x * (1 + scale) + shift`."""
    return torch.addcmul(shift, x, 1 + scale)


def layer_norm(dim: int, *, fused: bool) -> nn.Module:
    """Layer norm without learnt scale and shift; apex's kernel when `fused`.

    Raises:
        ConfigError: apex is asked for and not installed.
    """
    if not fused:
        return nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
    if importlib.util.find_spec("apex") is None:
        raise ConfigError(
            "model.enable_layernorm_kernel=True needs NVIDIA apex, which is not installed",
            hint="build it from github.com/NVIDIA/apex (`apex` on PyPI is something else), or leave the setting out",
        )
    # Installed only where it was asked for.
    from apex.normalization import FusedLayerNorm  # type: ignore[import-not-found, unused-ignore]

    norm: nn.Module = FusedLayerNorm(dim, eps=1e-6, elementwise_affine=False)
    return norm


class DropPath(nn.Module):
    """Leaves out a whole branch, per sample and in training only ("Deep networks with stochastic depth", 2016)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0 or not self.training:
            return x
        keep = 1 - self.rate
        return x * x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(keep).div_(keep)


class FinalLayer(nn.Module):
    """Modulated norm, then a projection to the values of a patch (T2IFinalLayer of PixArt-α)."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.scale_shift_table = nn.Parameter(torch.empty(2, dim))
        self.linear = nn.Linear(dim, out_dim)

    def _modulated_norm(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table + time.unsqueeze(1)).unsqueeze(1).unbind(2)
        return modulate(F.layer_norm(x, (self.dim,), eps=1e-6), shift.unsqueeze(1), scale.unsqueeze(1))

    def forward(self, x: Tensor, time: Tensor, *, frame_mask: Tensor | None, time_zero: Tensor | None) -> Tensor:
        """`x [B, T, S, C]`, embedded times `[B, C]` to `[B, T, S, out_dim]`.

        Where `frame_mask [B, T]` is False, a frame is at time 0. Such frames are normalised and modulated twice, first
        with the sample's time, as the published models were trained.
        """
        x = self._modulated_norm(x, time)
        if frame_mask is not None and time_zero is not None:
            x = torch.where(frame_mask[:, :, None, None], x, self._modulated_norm(x, time_zero))
        out: Tensor = self.linear(x)
        return out
