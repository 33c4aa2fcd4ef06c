"""What turns latents, times, sizes and captions into vectors of the model's width."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name


def sinusoid(values: Tensor, dim: int) -> Tensor:
    """`[n]` scalars to `[n, dim]`: cosines, then sines, of `value x 10000^(-i / (dim/2))`, in at least fp32."""
    dtype = torch.promote_types(values.dtype, torch.float32) if values.is_floating_point() else torch.float32
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=values.device, dtype=dtype) * (-math.log(10000.0) / half))
    angles = values.to(dtype).unsqueeze(-1) * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def position_embedding(
    height: int, width: int, dim: int, *, scale: float, base_size: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Sines and cosines of the place in a `height x width` grid, `[height * width, dim]`, row by row.

    The first half of the width encodes the column, the second the row. A grid of any size and shape covers the range
    of a `base_size x base_size` grid divided by `scale`, so one model serves all resolutions.
    """
    omega = 10000.0 ** (-torch.arange(0, dim // 2, 2, device=device, dtype=torch.float64) / (dim // 2))

    def axis(size: int) -> Tensor:
        places = torch.arange(size, device=device, dtype=torch.float64) / scale * (base_size / size)
        angles = torch.outer(places, omega)
        return torch.cat((angles.sin(), angles.cos()), dim=-1)

    rows = axis(height)[:, None].expand(-1, width, -1)
    columns = axis(width)[None].expand(height, -1, -1)
    return torch.cat((columns, rows), dim=-1).flatten(0, 1).to(dtype)


class PatchEmbed3D(nn.Module):
    """One token per patch of a latent: a convolution whose stride is its kernel, done as one matrix product.

    The product gives `[B, T, S, C]` directly, where a convolution would give channels first and cost a transposition.
    """

    def __init__(self, patch_size: tuple[int, int, int], in_channels: int, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv3d(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """`x [B, channels, frames, rows, columns]` to `[B, T, S, C]`; the end is padded with zeros to whole patches."""
        pt, ph, pw = self.patch_size
        B, channels, *size = x.shape
        missing = [-n % p for n, p in zip(size, self.patch_size, strict=True)]
        if any(missing):
            x = F.pad(x, (0, missing[2], 0, missing[1], 0, missing[0]))
        T, H, W = ((n + m) // p for n, m, p in zip(size, missing, self.patch_size, strict=True))
        patches = x.view(B, channels, T, pt, H, ph, W, pw).permute(0, 2, 4, 6, 1, 3, 5, 7)
        return F.linear(patches.reshape(B, T, H * W, -1), self.proj.weight.flatten(1), self.proj.bias)


def unpatchify(x: Tensor, patch_size: tuple[int, int, int], size: tuple[int, int, int]) -> Tensor:
    """`x [B, T, S, pt * ph * pw * channels]` back to `[B, channels, frames, rows, columns]`, cut to `size`."""
    pt, ph, pw = patch_size
    H, W = (-(-n // p) for n, p in zip(size[1:], patch_size[1:], strict=True))
    B, T = x.shape[:2]
    x = x.view(B, T, H, W, pt, ph, pw, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
    x = x.reshape(B, -1, T * pt, H * ph, W * pw)
    if x.shape[2:] == size:
        return x
    # A copy, since sharding wrappers cannot put their hooks on a view that a model returns.
    return x[:, :, : size[0], : size[1], : size[2]].contiguous()


class ScalarEmbedder(nn.Module):
    """A number per sample (time, frame rate) to a vector: sinusoid, then a two-layer MLP."""

    FREQUENCIES = 256

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, values: Tensor, *, dtype: torch.dtype) -> Tensor:
        """`values [n]` to `[n, C]`. The numbers keep their precision; only their sinusoids are rounded to `dtype`."""
        out: Tensor = self.mlp(sinusoid(values, self.FREQUENCIES).to(dtype))
        return out


class CaptionEmbedder(nn.Module):
    """Projects packed text tokens to the model's width, and replaces dropped captions by the null caption."""

    def __init__(self, caption_channels: int, dim: int, *, num_tokens: int) -> None:
        super().__init__()
        self.y_proj = MLP(caption_channels, dim, dim)
        self.y_embedding: Tensor
        self.register_buffer("y_embedding", torch.randn(num_tokens, caption_channels) / caption_channels**0.5)

    def forward(self, tokens: Tensor, dropped: Tensor | None, place: Tensor | None) -> Tensor:
        """Packed `tokens [n, caption_channels]` to `[n, C]`.

        `dropped [n]` says which tokens belong to a dropped caption, `place [n]` where in its caption each one stands.
        """
        if dropped is not None and place is not None:
            tokens = torch.where(dropped.unsqueeze(-1), self.y_embedding[place].to(tokens.dtype), tokens)
        out: Tensor = self.y_proj(tokens)
        return out


class MLP(nn.Module):
    """Linear, GELU (tanh form), linear."""

    def __init__(self, dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out
