"""A video codec without weights, with the interface of a video autoencoder.

Blocks of 8 x 8 pixels by up to 4 frames go through an orthonormal colour transform and a 3-D cosine transform (Ahmed,
Natarajan and Rao, 1974); the coefficients that carry most of natural video are kept as latent channels, each divided
by its usual size. It needs no download, and is the control against which a learnt autoencoder is judged.

Time is cut as `OpenSoraVAE_V1_2` cuts it: chunks of 17 frames give 5 latents, of 1 + 4 + 4 + 4 + 4 frames; a rest of
r frames gives ceil(r / 4), of which the first stands for the odd frames. A group of fewer than 4 frames is scaled so
that a static picture has the same latent at every position, and an image the latent of a still video.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from opensora.config.components import CodecConfig
from opensora.errors import ConfigError
from opensora.models.vae.codec_table import COEFFICIENT_SIZES

BLOCK = 8
GROUP = 4
CHUNK = 17
CHUNK_LATENTS = 5


class VideoCodec(nn.Module):
    """Pixels to cosine coefficients and back.

    Args:
        channels: Latent channels; the kept coefficients, in falling order of their size in natural video.
        micro_batch_size: Clips transformed at a time; all of them unless given.
    """

    def __init__(self, channels: int = 16, micro_batch_size: int | None = None) -> None:
        super().__init__()
        CodecConfig(channels=channels, micro_batch_size=micro_batch_size)
        self.out_channels = channels
        self.patch_size = (GROUP, BLOCK, BLOCK)
        self.micro_frame_size = CHUNK
        self.micro_batch_size = micro_batch_size
        for frames in range(1, GROUP + 1):
            analysis, synthesis = _bases(frames, channels)
            self.register_buffer(f"analysis_{frames}", analysis.float(), persistent=False)
            self.register_buffer(f"synthesis_{frames}", synthesis.float(), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.get_buffer("analysis_1").device

    @property
    def dtype(self) -> torch.dtype:
        return self.get_buffer("analysis_1").dtype

    def get_latent_size(self, input_size: Sequence[int | None]) -> list[int | None]:
        """`[frames, height, width]` in pixels to those of the latent; what is `None` stays so."""
        frames, height, width = input_size
        return [
            None if frames is None else sum(len(groups) for groups in _chunks(frames)),
            None if height is None else height // BLOCK,
            None if width is None else width // BLOCK,
        ]

    def encode(self, x: Tensor) -> Tensor:
        """`x [B, 3, T, H, W]` within -1 and 1 to `[B, channels, T', H // 8, W // 8]`.

        Rows and columns beyond a multiple of 8 are cut off at the bottom and right.
        """
        x = x[..., : x.shape[-2] // BLOCK * BLOCK, : x.shape[-1] // BLOCK * BLOCK].to(self.dtype)
        parts = torch.split(x, self.micro_batch_size or max(x.shape[0], 1))
        return torch.cat([self._encode(part) for part in parts])

    def decode(self, z: Tensor, num_frames: int | None = None) -> Tensor:
        """`z [B, channels, T', h, w]` to `[B, 3, num_frames, 8 h, 8 w]`.

        Several numbers of frames have the same latent length; without `num_frames` it is the largest of them. Values
        may lie outside of -1 and 1.

        Raises:
            ConfigError: a video of `num_frames` frames has another latent length.
        """
        if num_frames is None:
            num_frames = z.shape[2] // CHUNK_LATENTS * CHUNK + z.shape[2] % CHUNK_LATENTS * GROUP
        if self.get_latent_size([num_frames, None, None])[0] != z.shape[2]:
            raise ConfigError(
                f"{z.shape[2]} latent frames cannot be decoded to num_frames={num_frames}",
                hint=f"{num_frames} frames have {self.get_latent_size([num_frames, None, None])[0]} latent frames",
            )
        parts = torch.split(z.to(self.dtype), self.micro_batch_size or max(z.shape[0], 1))
        return torch.cat([self._decode(part, num_frames) for part in parts])

    def _encode(self, x: Tensor) -> Tensor:
        latents: list[Tensor] = []
        for groups in _chunks(x.shape[2]):
            head, x = x[:, :, : groups[0]], x[:, :, groups[0] :]
            latents.append(self._analyse(head, groups[0]))
            if len(groups) > 1:
                rest = sum(groups[1:])
                latents.append(self._analyse(x[:, :, :rest], GROUP))
                x = x[:, :, rest:]
        return torch.cat(latents, dim=2)

    def _decode(self, z: Tensor, num_frames: int) -> Tensor:
        clips: list[Tensor] = []
        for groups in _chunks(num_frames):
            clips.append(self._synthesise(z[:, :, :1], groups[0]))
            if len(groups) > 1:
                clips.append(self._synthesise(z[:, :, 1 : len(groups)], GROUP))
            z = z[:, :, len(groups) :]
        return torch.cat(clips, dim=2)

    def _analyse(self, x: Tensor, frames: int) -> Tensor:
        """Groups of `frames` frames to one latent each."""
        B, _, T, H, W = x.shape
        blocks = x.reshape(B, 3, T // frames, frames, H // BLOCK, BLOCK, W // BLOCK, BLOCK)
        blocks = blocks.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)
        return (blocks @ self.get_buffer(f"analysis_{frames}")).permute(0, 4, 1, 2, 3)

    def _synthesise(self, z: Tensor, frames: int) -> Tensor:
        """One group of `frames` frames for each latent."""
        B, _, T, h, w = z.shape
        blocks = z.permute(0, 2, 3, 4, 1) @ self.get_buffer(f"synthesis_{frames}")
        blocks = blocks.view(B, T, h, w, 3, frames, BLOCK, BLOCK).permute(0, 4, 1, 5, 2, 6, 3, 7)
        return blocks.reshape(B, 3, T * frames, h * BLOCK, w * BLOCK)


def _chunks(num_frames: int) -> list[list[int]]:
    """The groups of frames of each chunk: `[[1, 4, 4, 4, 4], [2, 4]]` for 23 frames."""
    sizes = [CHUNK] * (num_frames // CHUNK) + ([num_frames % CHUNK] if num_frames % CHUNK else [])
    return [[(size - 1) % GROUP + 1] + [GROUP] * ((size - 1) // GROUP) for size in sizes]


def _cosines(n: int) -> Tensor:
    """The orthonormal cosine transform (DCT-II) of length n, `[frequency, place]`."""
    places = torch.arange(n, dtype=torch.float64)
    matrix = torch.cos(math.pi / n * torch.outer(places, places + 0.5)) * math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix


def _bases(frames: int, channels: int) -> tuple[Tensor, Tensor]:
    """Matrices from the pixels of a block to its latent `[3 * frames * 64, channels]`, and back (transposed shape)."""
    colours = torch.tensor([[1, 1, 1], [1, 0, -1], [1, -2, 1]], dtype=torch.float64)
    colours /= colours.norm(dim=1, keepdim=True)
    times = torch.zeros(GROUP, frames, dtype=torch.float64)
    times[:frames] = _cosines(frames)
    places = _cosines(BLOCK)
    sizes = torch.tensor(COEFFICIENT_SIZES, dtype=torch.float64)
    kept = sizes.argsort(descending=True, stable=True)[:channels]
    basis = torch.einsum("cd,kt,yi,xj->ckyxdtij", colours, times, places, places).reshape(len(sizes), -1)[kept]
    sizes = sizes[kept].unsqueeze(1) * math.sqrt(frames / GROUP)
    return (basis / sizes).T.contiguous(), basis * sizes
