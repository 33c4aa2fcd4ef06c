"""Self-attention over one axis and cross-attention to packed text.

The parameters have the names of the published checkpoints (`qkv`, `q_norm`, `k_norm`, `proj`; `q_linear`, `kv_linear`).
All attention goes through `F.scaled_dot_product_attention`, or through the flash-attn package when that is asked for.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name

from opensora.errors import DataError, MissingExtraError


def rotary_table(num_positions: int, head_dim: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Cosines and signed sines of rotary position embedding, `[2, num_positions, 1, 1, head_dim]`.

    "RoFormer: Enhanced transformer with rotary position embedding" (Su et al., 2021), base 10000, for the interleaved
    pairs (0, 1), (2, 3), …: `x * table[0] + swap(x) * table[1]` rotates each pair by position x frequency.
    Computed in fp64 whatever the precision of the model.
    """
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float64) / head_dim)
    angles = torch.outer(torch.arange(num_positions, device=device, dtype=torch.float64), frequencies)
    cosines = angles.cos().repeat_interleave(2, dim=-1)
    sines = torch.stack((-angles.sin(), angles.sin()), dim=-1).flatten(-2)
    return torch.stack((cosines, sines))[:, :, None, None].to(dtype)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the pairs in the last axis of `x [B, positions, S, heads, head_dim]` by a rotary table."""
    swapped = x.reshape(*x.shape[:-1], -1, 2).flip(-1).flatten(-2)
    return torch.addcmul(x * table[0], swapped, table[1])


class RMSNorm(nn.Module):
    """Scale to unit root mean square, per head; statistics in at least fp32 (Zhang and Sennrich, 2019)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, eps=1e-6)


class SelfAttention(nn.Module):
    """Attention within each row (`spatial`) or along time at each place (`temporal`) of `[B, T, S, C]`.

    Both are views of one layout. Along the rows, (B, T) are the sequences. Along time, the places are folded into the
    heads, `[B, S * heads, T, head_dim]`: queries and keys leave norm and rotation contiguous, so only the values are
    copied.
    """

    def __init__(self, dim: int, num_heads: int, *, axis: Literal["spatial", "temporal"], qk_norm: bool, flash: bool):
        super().__init__()
        if flash and importlib.util.find_spec("flash_attn") is None:
            raise MissingExtraError("model.enable_flash_attn=True", extra="flash-attn")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.axis = axis
        self.flash = flash
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm: nn.Module = RMSNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm: nn.Module = RMSNorm(self.head_dim) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rotary: Tensor | None = None) -> Tensor:
        """`x [B, T, S, C]` to the same shape; `rotary` is a table over T."""
        B, T, S, C = x.shape
        q, k, v = self.qkv(x).view(B, T, S, 3, self.num_heads, self.head_dim).unbind(3)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        shape = (B * T, S, -1, self.head_dim) if self.axis == "spatial" else (B, T, -1, self.head_dim)
        out: Tensor = self.proj(self._attend(q.reshape(shape), k.reshape(shape), v.reshape(shape)).reshape(B, T, S, C))
        return out

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`[sequences, length, heads, head_dim]` to the same shape."""
        if self.flash and q.is_cuda:
            # Installed only where it was asked for, and slow to import.
            from flash_attn import flash_attn_func  # type: ignore[import-not-found, unused-ignore]

            out: Tensor = flash_attn_func(q, k, v)
            return out
        return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


@dataclass(frozen=True)
class TextLayout:
    """Where each caption lies in a batch of packed text `[sum of lengths, C]`; the same for all blocks."""

    lengths: tuple[int, ...]
    """Tokens per caption."""
    padded_index: Tensor | None
    """`[B * longest]`: which packed token stands at each padded place; `None` when all captions are equally long."""
    key_mask: Tensor | None
    """`[B, 1, 1, longest]` bool: which padded places hold a token."""

    @classmethod
    def build(cls, lengths: Sequence[int], *, device: torch.device) -> TextLayout:
        """Lengths are Python integers, so nothing waits for the device.

        Raises:
            DataError: a caption has no token, so that there would be nothing to attend to.
        """
        if min(lengths) < 1:
            raise DataError(
                f"caption {list(lengths).index(min(lengths))} of the batch has no valid token",
                hint="give at least one token per caption; an empty caption is its end-of-text token",
            )
        longest = max(lengths)
        if min(lengths) == longest:
            return cls(tuple(lengths), None, None)
        valid = torch.arange(longest) < torch.tensor(lengths).unsqueeze(1)
        index = (valid.flatten().cumsum(0) - 1).clamp_(min=0)
        return cls(
            tuple(lengths),
            index.to(device, non_blocking=True),
            valid[:, None, None, :].to(device, non_blocking=True),
        )


class CrossAttention(nn.Module):
    """Attention of each sample's tokens to its own caption. No norm and no gate, as in the published models."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(dim, dim)
        self.kv_linear = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, text: Tensor, layout: TextLayout) -> Tensor:
        """`x [B, ..., C]` attends to packed `text [sum of lengths, C]`."""
        B, C = x.shape[0], x.shape[-1]
        q = self.q_linear(x).view(B, -1, self.num_heads, C // self.num_heads)
        kv = self.kv_linear(text)
        if layout.padded_index is not None:
            kv = kv.index_select(0, layout.padded_index)
        k, v = kv.view(B, -1, 2, self.num_heads, C // self.num_heads).unbind(2)
        attended = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=layout.key_mask
        )
        out: Tensor = self.proj(attended.transpose(1, 2).reshape(x.shape))
        return out
