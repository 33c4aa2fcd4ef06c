"""One micro-batch: clips and captions in, a weighted loss out.

All draws are keyed by (seed, epoch, row, purpose), so that a sample meets the same noise, time, mask and caption drop
on whatever rank, in whatever order, after whatever restart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from opensora.config.train import TrainConfig
from opensora.datasets.loader import ClipBatch
from opensora.randomness import rng
from opensora.training.masks import MaskGenerator


class VideoEncoder(Protocol):
    """What training needs of a VAE."""

    def encode(self, x: Tensor) -> Tensor: ...


class TextEncoder(Protocol):
    """What training needs of a text encoder."""

    def encode(self, text: list[str]) -> dict[str, Tensor]: ...

    def null(self, n: int) -> Tensor: ...


class Scheduler(Protocol):
    """What training needs of a scheduler."""

    def training_losses(
        self,
        model: Any,
        x_start: Tensor,
        model_kwargs: dict[str, Any],
        *,
        noise: Tensor,
        mask: Tensor | None,
        t: Tensor,
    ) -> dict[str, Tensor]: ...

    def timesteps_from_uniform(self, u: Tensor, model_kwargs: dict[str, Any], *, num_latent_frames: int) -> Tensor: ...


@dataclass(frozen=True)
class Example:
    """An encoded micro-batch with everything that was drawn for it."""

    latents: Tensor
    """[B, C, T, H, W]"""
    noise: Tensor
    """like `latents`"""
    timesteps: Tensor
    """[B]"""
    mask: Tensor | None
    """bool [B, T], True where a frame is predicted"""
    drop_path_seed: int
    """Of torch's own generator, from which the model draws the layers to leave out."""
    model_kwargs: dict[str, Any]


@dataclass(frozen=True)
class WeightedLoss:
    """A part of the step's loss, which is the sum of all numerators over the sum of all denominators."""

    numerator: Tensor
    denominator: float


class DiffusionStep:
    """Encodes micro-batches and computes their losses."""

    def __init__(
        self,
        model: nn.Module,
        *,
        vae: VideoEncoder,
        text_encoder: TextEncoder,
        scheduler: Scheduler,
        config: TrainConfig,
        device: torch.device,
    ) -> None:
        self._model = model
        self._vae = vae
        self._text_encoder = text_encoder
        self._scheduler = scheduler
        self._config = config
        self._device = device
        self._dtype = torch.float64 if config.dtype == "fp64" else torch.float32
        self._masks = MaskGenerator(config.train.mask_ratios) if config.train.mask_ratios else None

    @torch.no_grad()
    def prepare(self, batch: ClipBatch) -> Example:
        """Encode a training micro-batch and draw what it needs."""
        latents, kwargs = self._encode(batch)
        num_latent_frames = latents.shape[2]
        keys = [(batch.epoch, row) for row in batch.ids]
        seed = self._config.seed
        noise = self._noise([rng(seed, epoch=epoch, row=row, purpose="noise") for epoch, row in keys], latents)
        u = torch.tensor(
            [rng(seed, epoch=epoch, row=row, purpose="timestep").random() for epoch, row in keys], dtype=torch.float64
        ).clamp(min=np.finfo(np.float64).tiny)
        timesteps = self._scheduler.timesteps_from_uniform(u, kwargs, num_latent_frames=num_latent_frames)
        drop = self._config.model.class_dropout_prob
        kwargs["drop_text"] = torch.tensor(
            [rng(seed, epoch=epoch, row=row, purpose="drop_text").random() < drop for epoch, row in keys]
        )
        mask = None
        if self._masks is not None:
            rows = [
                self._masks.mask_for(num_latent_frames, rng(seed, epoch=epoch, row=row, purpose="mask"))
                for epoch, row in keys
            ]
            mask = torch.tensor(rows, device=self._device)
            kwargs["x_mask"] = mask
        first_epoch, first_row = keys[0]
        drop_path = rng(seed, epoch=first_epoch, row=first_row, purpose="drop_path")
        return Example(latents, noise, timesteps.to(self._device), mask, int(drop_path.integers(2**63)), kwargs)

    @torch.no_grad()
    def prepare_validation(self, batch: ClipBatch) -> Example:
        """Encode a held-out micro-batch with noise that is always the same, and without time."""
        latents, kwargs = self._encode(batch)
        generators = [rng(self._config.seed, epoch=0, row=row, purpose="validation") for row in batch.ids]
        noise = self._noise(generators, latents)
        return Example(latents, noise, torch.zeros(len(batch.ids)), None, 0, kwargs)

    def loss(self, example: Example, *, timesteps: Tensor | None = None) -> WeightedLoss:
        """The loss of a micro-batch under `train.loss_weighting`."""
        if self._config.model.drop_path > 0:
            torch.manual_seed(example.drop_path_seed)
        terms = self._scheduler.training_losses(
            self._model,
            example.latents,
            example.model_kwargs,
            noise=example.noise,
            mask=example.mask,
            t=example.timesteps if timesteps is None else timesteps,
        )
        losses = terms["loss"]
        count = len(losses)
        if self._config.train.loss_weighting == "micro_batch":
            return WeightedLoss(losses.mean(), 1.0)
        if self._config.train.loss_weighting == "sample":
            return WeightedLoss(losses.sum(), float(count))
        tokens = num_tokens(example.latents, self._config.model.patch_size)
        return WeightedLoss(losses.sum() * tokens, float(count * tokens))

    def idle_loss(self) -> Tensor:
        """Zero, through every parameter: for a rank without work that must take part in its peers' collectives."""
        pt, ph, pw = self._config.model.patch_size
        # Of a single patch the model would return a view, on which sharding cannot put its hooks.
        latents = torch.zeros((1, self._channels(), pt, 2 * ph, 2 * pw), device=self._device, dtype=self._dtype)
        text = self._text_encoder.encode([""])
        output: Tensor = self._model(
            latents,
            torch.zeros(1, device=self._device),
            text["y"].to(self._device, self._dtype),
            mask=text.get("mask"),
            x_mask=None if self._masks is None else torch.zeros((1, 1), dtype=torch.bool, device=self._device),
            fps=torch.zeros(1, device=self._device),
            height=16 * ph,
            width=16 * pw,
            drop_text=torch.zeros(1, dtype=torch.bool),
        )
        return output.sum() * 0.0

    def _channels(self) -> int:
        channels = self._config.model.in_channels
        return self._config.vae.channels if channels is None else channels

    def _encode(self, batch: ClipBatch) -> tuple[Tensor, dict[str, Any]]:
        latents = self._vae.encode(batch.video.to(self._device)).to(self._dtype)
        text = self._text_encoder.encode(batch.text)
        kwargs: dict[str, Any] = {
            "y": text["y"].to(self._device, self._dtype),
            "mask": text.get("mask"),
            "fps": batch.fps.to(self._device),
            # One number for the batch: it is one bucket, and a Python number costs no wait for the device.
            "height": batch.shape.height,
            "width": batch.shape.width,
            "num_frames": batch.shape.num_frames,
            "ar": batch.shape.height / batch.shape.width,
        }
        return latents, kwargs

    def _noise(self, generators: list[np.random.Generator], latents: Tensor) -> Tensor:
        # Drawn on the CPU and in fp32 whatever the device and type, so that all train alike.
        shape = tuple(latents.shape[1:])
        draws = [torch.from_numpy(generator.standard_normal(shape, dtype=np.float32)) for generator in generators]
        return torch.stack(draws).to(self._device, self._dtype)


def num_tokens(latents: Tensor, patch_size: tuple[int, int, int]) -> int:
    """Patches per sample of latents [B, C, T, H, W]; borders are padded."""
    count = 1
    for size, patch in zip(latents.shape[2:], patch_size, strict=True):
        count *= -(-size // patch)
    return count
