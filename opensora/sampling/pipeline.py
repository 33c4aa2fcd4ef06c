"""From prompts to pixels: noise that belongs to a sample, references, loops, the scheduler and the VAE.

The pipeline knows nothing of files, command lines and ranks. Called on several ranks with a sharded model, all ranks
must make the same calls; how often the model runs depends on the settings alone, never on the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from opensora.errors import ConfigError
from opensora.randomness import rng
from opensora.sampling.prompts import extract_prompts_loop
from opensora.sampling.references import (
    FRAMES_PER_CHUNK,
    LATENTS_PER_CHUNK,
    VAE,
    append_generated,
    apply_mask_strategy,
    dframe_to_frame,
)
from opensora.schedulers.rf import RFLOW
from opensora.schedulers.rf.rectified_flow import TextEncoder

IMAGE_FPS = 120
"""The frame rate that models are told for pictures."""

_STREAMS_PER_LOOP = 2**20
"""More than any number of sampling steps."""


@dataclass(frozen=True)
class SampleKey:
    """Whose noise it is: clip number `draw` of the prompt in place `row`, under a seed."""

    seed: int
    row: int
    draw: int = 0

    def noise(self, shape: Sequence[int], *, loop: int = 0, step: int | None = None) -> np.ndarray:
        """Standard normal numbers, fp32: those that a loop starts from, or those that a step adds to edited frames.

        Each comes from a part of its own of the sample's random stream, so that none depends on whether another was
        drawn, nor on the batch.
        """
        source = rng(self.seed, epoch=self.draw, row=self.row, purpose="sample").bit_generator
        assert isinstance(source, np.random.Philox)
        stream = loop * _STREAMS_PER_LOOP + (0 if step is None else step + 1)
        return np.random.Generator(source.jumped(stream)).standard_normal(shape, dtype=np.float32)


def prepare_multi_resolution_info(
    info_type: str | None,
    batch_size: int,
    image_size: Sequence[int],
    num_frames: int,
    fps: float,
    device: torch.device | str,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """What a model is told about the size of its clips.

    Args:
        info_type: `STDiT2` or `OpenSora`: height, width, num_frames, ar (height over width), fps, each [B];
            `PixArtMS`: ar [B, 1] and hw [B, 2]; None: nothing.
        batch_size: B.
        image_size: height and width in pixels.
        num_frames: frames in pixels' time; a picture (1) gets the frame rate of pictures.
        fps: frames per second.
        device: of the result.
        dtype: of the result.

    Raises:
        ConfigError: an unknown type.
    """
    height, width = image_size

    def column(*values: float) -> Tensor:
        return torch.tensor(values, device=device, dtype=dtype).repeat(batch_size, 1)

    if info_type is None:
        return {}
    if info_type == "PixArtMS":
        return {"ar": column(height / width), "hw": column(height, width)}
    if info_type in ("STDiT2", "OpenSora"):
        values = {
            "height": height,
            "width": width,
            "num_frames": num_frames,
            "ar": height / width,
            "fps": fps if num_frames > 1 else IMAGE_FPS,
        }
        return {name: column(value)[:, 0] for name, value in values.items()}
    raise ConfigError(f"multi_resolution={info_type!r} is unknown", hint="known: STDiT2, OpenSora, PixArtMS")


class SamplingPipeline:
    """Model, VAE, text encoder and scheduler, put together.

    Args:
        model: called in evaluation mode, whatever mode it is in.
        vae: keeps its own device and type.
        text_encoder: encodes prompts; is told where the model's null caption is.
        scheduler: integrates.
        device: of the model.
        dtype: what the model is called with. Latents are integrated in fp32 at least.
    """

    def __init__(
        self,
        model: nn.Module,
        vae: VAE,
        text_encoder: TextEncoder,
        scheduler: RFLOW,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        self.model = model
        self.vae = vae
        self.text_encoder = text_encoder
        text_encoder.y_embedder = getattr(model, "y_embedder", None)
        self.scheduler = scheduler
        self.device = torch.device(device)
        self.dtype = dtype

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        *,
        num_frames: int,
        image_size: tuple[int, int],
        fps: float,
        keys: Sequence[SampleKey],
        num_sampling_steps: int | None = None,
        cfg_scale: float | None = None,
        multi_resolution: str | None = "STDiT2",
        references: Sequence[Sequence[Tensor]] | None = None,
        mask_strategies: Sequence[str] | None = None,
        align: int | None = None,
        loop: int = 1,
        condition_frame_length: int = 5,
        condition_frame_edit: float = 0.0,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """One clip per prompt.

        Args:
            prompts: B of them, cleaned; those with loop marks change from loop to loop.
            num_frames: frames per loop.
            image_size: height and width in pixels.
            fps: the frame rate that the model is told.
            keys: one per prompt: whose noise it is.
            num_sampling_steps: the scheduler's unless given.
            cfg_scale: guidance; the scheduler's unless given.
            multi_resolution: what the model is told of the size (`prepare_multi_resolution_info`).
            references: per prompt, latents [C, T', H', W'].
            mask_strategies: per prompt, where they go.
            align: see `apply_mask_strategy`.
            loop: clips in a row, each continuing the one before.
            condition_frame_length: latent frames that a loop takes over.
            condition_frame_edit: their mask value.
            on_step: told (model steps done, in all).

        Returns:
            Pixels [B, 3, T, H, W], about -1 to 1, on the VAE's device. With loops, T is
            `loop * num_frames - (loop - 1) * dframe_to_frame(condition_frame_length)`.

        Raises:
            ConfigError: a loop would leave nothing to generate.
            DataError: a mask strategy does not fit.
        """
        batch = len(prompts)
        if len(keys) != batch:
            raise ConfigError(f"{len(keys)} keys of noise for {batch} prompts", hint="give one per prompt")
        shape = self._latent_shape(num_frames, image_size)
        if loop > 1 and (condition_frame_length >= shape[1] or num_frames % FRAMES_PER_CHUNK):
            raise ConfigError(
                f"loop={loop} with condition_frame_length={condition_frame_length} and {num_frames} frames "
                f"({shape[1]} latent frames) is not possible: a loop takes over whole chunks of {LATENTS_PER_CHUNK} "
                f"latent frames and must leave some to generate",
                hint=f"use num_frames of at least {2 * FRAMES_PER_CHUNK}, a multiple of {FRAMES_PER_CHUNK}",
            )
        refs = [list(sample) for sample in references] if references is not None else [[] for _ in prompts]
        strategies = list(mask_strategies) if mask_strategies is not None else [""] * batch
        info = prepare_multi_resolution_info(
            multi_resolution, batch, image_size, num_frames, fps, "cpu", torch.float32
        )  # on the CPU: models need sizes as numbers
        steps = num_sampling_steps if num_sampling_steps is not None else self.scheduler.config.num_sampling_steps

        clips: list[Tensor] = []
        with _evaluation(self.model):
            for index in range(loop):
                if index > 0:
                    refs, strategies = append_generated(
                        self.vae, clips[-1], refs, strategies, index, condition_frame_length, condition_frame_edit
                    )
                z = self._noise(keys, shape, loop=index)
                mask = apply_mask_strategy(z, refs, strategies, index, align)
                latents = self.scheduler.sample(
                    self._call_model,
                    self.text_encoder,
                    z,
                    extract_prompts_loop(prompts, index),
                    self.device,
                    additional_args=info,
                    mask=None if bool((mask == 1).all()) else mask,
                    guidance_scale=cfg_scale,
                    progress=False,
                    num_sampling_steps=steps,
                    fresh_noise=lambda step, loop=index: self._noise(keys, shape, loop=loop, step=step),  # type: ignore[misc]  # binds the loop
                    on_step=None if on_step is None else _shifted(on_step, done=index * steps, total=loop * steps),
                )
                clips.append(self.vae.decode(latents.to(self.vae.device, self.vae.dtype), num_frames=num_frames))
        overlap = dframe_to_frame(condition_frame_length) if loop > 1 else 0
        return torch.cat([clips[0], *(clip[:, :, overlap:] for clip in clips[1:])], dim=2)

    def _latent_shape(self, num_frames: int, image_size: tuple[int, int]) -> tuple[int, int, int, int]:
        size = self.vae.get_latent_size([num_frames, *image_size])
        frames, height, width = (int(n or 0) for n in size)
        if min(frames, height, width) < 1:
            raise ConfigError(
                f"{num_frames} frames of {image_size[0]}x{image_size[1]} pixels have no latent",
                hint="at least one frame of 8x8 pixels",
            )
        return self.vae.out_channels, frames, height, width

    def _noise(self, keys: Sequence[SampleKey], shape: Sequence[int], *, loop: int, step: int | None = None) -> Tensor:
        drawn = np.stack([key.noise(shape, loop=loop, step=step) for key in keys])
        return torch.from_numpy(drawn).to(self.device, torch.promote_types(self.dtype, torch.float32))

    def _call_model(self, x: Tensor, t: Tensor, **args: Any) -> Tensor:
        args["y"] = args["y"].to(self.dtype)
        out: Tensor = self.model(x.to(self.dtype), t, **args)
        return out


def _shifted(on_step: Callable[[int, int], None], *, done: int, total: int) -> Callable[[int, int], None]:
    return lambda step, _: on_step(done + step, total)


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within, each module's own mode after."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
