"""References: pictures and clips that parts of a sample are made from, and the mask strategies that place them.

Frames are counted in latent frames unless said otherwise. A mask value of 1 generates a frame, 0 keeps the reference,
and a fraction keeps it until the noise level has fallen to that value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from opensora.datasets.reader import read_from_path
from opensora.errors import ConfigError, DataError

LATENTS_PER_CHUNK = 5
FRAMES_PER_CHUNK = 17
"""The VAEs turn every 17 frames into 5 latent frames."""


class VAE(Protocol):
    """What sampling needs of a VAE."""

    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def out_channels(self) -> int: ...
    def encode(self, x: Tensor) -> Tensor:
        """Pixels [B, 3, T, H, W] in [-1, 1] → latents."""

    def decode(self, z: Tensor, num_frames: int | None = None) -> Tensor:
        """Latents → pixels."""

    def get_latent_size(self, input_size: Sequence[int | None]) -> list[int | None]:
        """Frames, height and width in pixels → those of the latent."""


@dataclass(frozen=True)
class Placement:
    """One group of a mask strategy: which part of which reference goes where."""

    loop: int = 0
    reference: int = 0
    reference_start: int = 0
    target_start: int = 0
    length: int = 1
    edit_ratio: float = 0.0


def parse_mask_strategy(mask_strategy: str | None) -> list[Placement]:
    """`;`-separated groups of up to six numbers: loop, reference, reference start, target start, length, edit ratio.

    What is left out at the end of a group is 0, 0, 0, 0, 1, 0. Negative starts count from the end.

    Raises:
        DataError: a group is not such a list, or a number is impossible.
    """
    placements: list[Placement] = []
    if not mask_strategy:
        return placements
    for group in mask_strategy.split(";"):
        try:
            numbers = [part.strip() for part in group.split(",")]
            placement = Placement(*map(int, numbers[:5]), *map(float, numbers[5:]))
        except (ValueError, TypeError) as error:
            raise DataError(
                f"mask strategy {mask_strategy!r}: {group!r} is not a list of one to six numbers",
                hint="loop, reference, reference start, target start, length, edit ratio; for example 0,0,0,0,1,0",
            ) from error
        if placement.loop < 0 or placement.reference < 0 or placement.length < 1 or not 0 <= placement.edit_ratio <= 1:
            raise DataError(
                f"mask strategy {mask_strategy!r}: impossible group {group!r}",
                hint="loop and reference count from 0, the length from 1, the edit ratio is within 0 and 1",
            )
        placements.append(placement)
    return placements


def snap(value: int, step: int, end: int) -> int:
    """The multiple of `step` that is nearest to `value`, among those that start a whole step before `end`."""
    steps, rest = divmod(value, step)
    if rest > step / 2 and steps < end // step - 1:
        steps += 1
    return steps * step


def apply_mask_strategy(
    z: Tensor,
    refs_x: Sequence[Sequence[Tensor]],
    mask_strategys: Sequence[str],
    loop_i: int,
    align: int | None = None,
) -> Tensor:
    """Write references into the noise `z` [B, C, T, H, W], in place.

    Args:
        z: noise.
        refs_x: per sample, its references [C, T, H, W].
        mask_strategys: per sample.
        loop_i: only groups of this loop apply.
        align: snap both starts to multiples of this many latent frames.

    Returns:
        The mask [B, T], float: 1 where nothing was written.

    Raises:
        DataError: a group names a reference or a frame that does not exist.
    """
    num_frames = z.shape[2]
    masks = torch.ones(len(z), num_frames, dtype=torch.float32, device=z.device)
    for i, strategy in enumerate(mask_strategys):
        for placement in parse_mask_strategy(strategy):
            if placement.loop != loop_i:
                continue
            if placement.reference >= len(refs_x[i]):
                raise DataError(
                    f"mask strategy {strategy!r} uses reference {placement.reference}, but there are {len(refs_x[i])}",
                    hint="references count from 0, in the order of reference_path",
                )
            ref = refs_x[i][placement.reference]
            source = _start(placement.reference_start, ref.shape[1], align, strategy)
            target = _start(placement.target_start, num_frames, align, strategy)
            length = min(placement.length, num_frames - target, ref.shape[1] - source)
            z[i, :, target : target + length] = ref[:, source : source + length].to(z)
            masks[i, target : target + length] = placement.edit_ratio
    return masks


def _start(start: int, end: int, align: int | None, strategy: str) -> int:
    absolute = start + end if start < 0 else start
    if not 0 <= absolute < end:
        raise DataError(
            f"mask strategy {strategy!r}: frame {start} does not exist among {end} latent frames",
            hint="17 frames are 5 latent frames, a picture is 1; negative numbers count from the end",
        )
    return absolute if align is None else snap(absolute, align, end)


def collect_references_batch(reference_paths: Sequence[str], vae: VAE, image_size: Sequence[int]) -> list[list[Tensor]]:
    """Per sample, the latents [C, T, H, W] of its `;`-separated references, brought to `image_size` (height, width)."""

    def encode(path: str) -> Tensor:
        pixels = read_from_path(path, (image_size[0], image_size[1]), transform_name="resize_crop")
        return vae.encode(pixels[None].to(vae.device, vae.dtype))[0]

    return [[encode(path.strip()) for path in paths.split(";") if path.strip()] for paths in reference_paths]


def append_generated(
    vae: VAE,
    generated_video: Tensor,
    refs_x: Sequence[Sequence[Tensor]],
    mask_strategy: Sequence[str],
    loop_i: int,
    condition_frame_length: int,
    condition_frame_edit: float,
) -> tuple[list[list[Tensor]], list[str]]:
    """Let loop `loop_i` start from the end of the clips before it.

    Args:
        vae: encodes them.
        generated_video: pixels [B, 3, T, H, W].
        refs_x: references so far.
        mask_strategy: strategies so far.
        loop_i: the loop that is to continue.
        condition_frame_length: latent frames taken over.
        condition_frame_edit: their mask value.

    Returns:
        New references and strategies.
    """
    latents = vae.encode(generated_video.to(vae.device, vae.dtype))
    references = [[*refs, latent] for refs, latent in zip(refs_x, latents, strict=True)]
    group = f"-{condition_frame_length},0,{condition_frame_length},{condition_frame_edit}"
    strategies = [
        ";".join([*([strategy] if strategy else []), f"{loop_i},{len(refs) - 1},{group}"])
        for strategy, refs in zip(mask_strategy, references, strict=True)
    ]
    return references, strategies


def dframe_to_frame(num: int) -> int:
    """Latent frames → pixel frames, for whole chunks of 5.

    Raises:
        ConfigError: not a multiple of 5.
    """
    if num % LATENTS_PER_CHUNK:
        raise ConfigError(
            f"{num} latent frames are not a multiple of {LATENTS_PER_CHUNK}",
            hint=f"{LATENTS_PER_CHUNK} latent frames are {FRAMES_PER_CHUNK} frames",
        )
    return num // LATENTS_PER_CHUNK * FRAMES_PER_CHUNK
