"""The rectified-flow scheduler: draws of time, the training loss, the Euler sampler with guidance and masks."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from opensora.config.components import RFlowConfig
from opensora.errors import ConfigError
from opensora.schedulers.rf import formulas


class TextEncoder(Protocol):
    """What the sampler needs of a text encoder."""

    y_embedder: nn.Module | None
    """The model's caption embedder, which holds the null caption."""

    def encode(self, text: list[str]) -> dict[str, Tensor]:
        """`y` [B, 1, L, D] and `mask` [B, L]."""

    def null(self, n: int) -> Tensor:
        """The null caption, [n, 1, L, D]."""


class RFLOW:
    """Rectified flow with the settings of `RFlowConfig` as keywords.

    Times are given to the model as they are, from 0 (data) to `num_timesteps` (noise). The model may return more
    channels than the latent has; the first ones are the velocity.
    """

    def __init__(self, **settings: Any) -> None:
        names = [field.name for field in fields(RFlowConfig)]
        for name in settings:
            if name not in names:
                close = difflib.get_close_matches(name, names, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"known settings: {', '.join(names)}"
                raise ConfigError(f"scheduler.{name}: rflow has no such setting", hint=hint)
        self.config = RFlowConfig(**settings)

    @property
    def scheduler(self) -> RFLOW:
        """Open-Sora's name for the part with `add_noise` and `training_losses`: this object."""
        return self

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t for times [B] (0 to `num_timesteps`), in fp32 at least."""
        dtype = torch.promote_types(original_samples.dtype, torch.float32)
        return formulas.interpolate(original_samples, noise, timesteps.to(dtype) / self.config.num_timesteps)

    def transform_timesteps(self, t: Tensor, model_kwargs: Mapping[str, Any], *, num_latent_frames: int) -> Tensor:
        """Shift times [B] for the size of the clip, if the settings ask for it; the same in loss and sampling.

        Args:
            t: times, 0 to `num_timesteps`.
            model_kwargs: holds `height` and `width` in pixels, numbers or [B].
            num_latent_frames: T of the latent.

        Raises:
            ConfigError: `height` or `width` is missing.
        """
        if not self.config.use_timestep_transform:
            return t
        missing = [name for name in ("height", "width") if name not in model_kwargs]
        if missing:
            raise ConfigError(
                f"scheduler.use_timestep_transform=True, but the clip's {' and '.join(missing)} in pixels is not given",
                hint="pass height and width with the model's arguments, or set use_timestep_transform=False",
            )
        height, width = (torch.as_tensor(model_kwargs[name], device=t.device) for name in ("height", "width"))
        ratio = formulas.shift_ratio(
            height, width, num_latent_frames=num_latent_frames, scale=self.config.transform_scale
        )
        total = self.config.num_timesteps
        return (formulas.shift(t.double() / total, ratio) * total).to(t.dtype)

    def timesteps_from_uniform(self, u: Tensor, model_kwargs: Mapping[str, Any], *, num_latent_frames: int) -> Tensor:
        """Training times [B] from uniform numbers `u` in (0, 1): the inverse of the configured distribution, shifted.

        Every draw of time goes through here, so a caller that owns the uniform numbers owns the times.
        """
        total = self.config.num_timesteps
        if self.config.use_discrete_timesteps:
            t = torch.floor(u * total).clamp(max=total - 1)
        elif self.config.sample_method == "logit-normal":
            t = formulas.logit_normal_quantile(u, loc=self.config.loc, scale=self.config.scale) * total
        else:
            t = u * total
        return self.transform_timesteps(t, model_kwargs, num_latent_frames=num_latent_frames)

    def training_losses(
        self,
        model: Callable[..., Tensor],
        x_start: Tensor,
        model_kwargs: Mapping[str, Any] | None = None,
        noise: Tensor | None = None,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
        t: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """The squared error of the predicted velocity.

        Args:
            model: called as `model(x_t, t, **model_kwargs)`; with a mask, `model_kwargs` holds it as `x_mask`.
            x_start: clean latents [B, C, T, H, W].
            model_kwargs: also where `height` and `width` are looked up for the shift of times.
            noise: like `x_start`; drawn unless given.
            mask: bool [B, T]; frames that are False stay clean and do not count.
            weights: one factor per whole time, [num_timesteps] or more.
            t: times [B], already shifted; drawn unless given.
            generator: of what is drawn here.

        Returns:
            `loss` [B], and `weight` [B]: 0 for a sample without any frame to predict (its loss is 0), else 1.
        """
        kwargs = dict(model_kwargs or {})
        dtype = torch.promote_types(x_start.dtype, torch.float32)
        batch, channels, num_latent_frames = x_start.shape[:3]
        if t is None:
            u = torch.rand(batch, dtype=torch.float64, device=x_start.device, generator=generator)
            t = self.timesteps_from_uniform(u, kwargs, num_latent_frames=num_latent_frames)
        if noise is None:
            noise = torch.randn(x_start.shape, dtype=x_start.dtype, device=x_start.device, generator=generator)
        t = t.to(x_start.device, dtype)
        tau = t / self.config.num_timesteps
        if mask is not None:
            tau = tau[:, None] * mask.to(dtype)
        predicted = model(formulas.interpolate(x_start, noise, tau), t, **kwargs)[:, :channels]
        error = (predicted.to(dtype) - formulas.velocity(x_start, noise).to(dtype)) ** 2
        loss = formulas.mean_over_frames(error, mask)
        if weights is not None:
            loss = loss * weights.to(loss)[t.long().clamp(max=len(weights) - 1)]
        weight = torch.ones_like(loss) if mask is None else mask.bool().any(1).to(loss.dtype)
        return {"loss": loss, "weight": weight}

    def sampling_timesteps(
        self,
        model_kwargs: Mapping[str, Any],
        *,
        batch: int,
        num_latent_frames: int,
        num_sampling_steps: int | None = None,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """The times at which the model is asked, [steps, B] float64: from noise towards data, the end (0) left out."""
        steps = num_sampling_steps if num_sampling_steps is not None else self.config.num_sampling_steps
        total = self.config.num_timesteps
        grid = [(1 - i / steps) * total for i in range(steps)]
        if self.config.use_discrete_timesteps:
            grid = [float(round(t)) for t in grid]
        times = torch.tensor(grid, dtype=torch.float64, device=device)[:, None].expand(steps, batch)
        return self.transform_timesteps(times, model_kwargs, num_latent_frames=num_latent_frames)

    @torch.no_grad()
    def sample(
        self,
        model: Callable[..., Tensor],
        text_encoder: TextEncoder,
        z: Tensor,
        prompts: list[str],
        device: torch.device | str,
        additional_args: Mapping[str, Any] | None = None,
        mask: Tensor | None = None,
        guidance_scale: float | None = None,
        progress: bool = True,
        *,
        num_sampling_steps: int | None = None,
        fresh_noise: Callable[[int], Tensor] | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Integrate from noise to latents [B, C, T, H, W] with Euler steps.

        The model is called once per step with both halves of the guidance (conditional first), or with the
        conditional half alone where the guidance is 1. The number of calls depends on the settings only.

        Args:
            model: called as `model(z, t, **args)`.
            text_encoder: encodes the prompts and gives the null caption.
            z: noise [B, C, T, H, W]; frames with mask below 1 hold the clean reference instead.
            prompts: one per sample.
            device: where to sample.
            additional_args: what the model is told besides (`height`, `width`, `fps`, ...).
            mask: [B, T]: 1 generates a frame, 0 keeps it, a fraction r keeps it until the noise level has fallen to r,
                adds noise of that level once and generates from there.
            guidance_scale: instead of the setting `cfg_scale`.
            progress: show a bar on stderr.
            num_sampling_steps: instead of the setting.
            fresh_noise: step index → the noise, like `z`, for frames with a fractional mask; drawn unless given.
            on_step: told (steps done, steps in all).
        """
        scale = self.config.cfg_scale if guidance_scale is None else guidance_scale
        guided = scale != 1
        halves = 2 if guided else 1
        total = self.config.num_timesteps
        batch, channels, num_latent_frames = z.shape[:3]

        args = dict(additional_args or {})
        args.update(text_encoder.encode(prompts))
        args["y"] = args["y"].to(device)
        if guided:
            args["y"] = torch.cat([args["y"], text_encoder.null(batch).to(args["y"])])

        z = z.to(device, torch.promote_types(z.dtype, torch.float32))
        times = self.sampling_timesteps(
            args, batch=batch, num_latent_frames=num_latent_frames, num_sampling_steps=num_sampling_steps, device=device
        ).to(z.dtype)
        ends = torch.cat([times[1:], torch.zeros_like(times[:1])])
        if mask is not None:
            mask = mask.to(device, z.dtype)
            noised = mask == 1
            is_edited = bool(((mask > 0) & (mask < 1)).any())

        steps: Iterable[int] = range(len(times))
        if progress:
            steps = track(steps, description="sampling", total=len(times), console=Console(stderr=True))
        for i in steps:
            t, end = times[i], ends[i]
            kept = z
            if mask is not None:
                active = mask * total >= t[:, None]
                if is_edited:
                    noise = torch.randn_like(z) if fresh_noise is None else fresh_noise(i).to(z)
                    z = torch.where(formulas.per_frame(active & ~noised), self.add_noise(z, noise, t), z)
                    noised = active
                args["x_mask"] = active.repeat(halves, 1)
            v = model(torch.cat([z] * halves), t.repeat(halves), **args)[:, :channels].to(z.dtype)
            if guided:
                conditional, unconditional = v.chunk(2)
                v = formulas.guide(conditional, unconditional, scale)
            z = z + v * formulas.per_frame((t - end) / total)
            if mask is not None:
                z = torch.where(formulas.per_frame(active), z, kept)
            if on_step is not None:
                on_step(i + 1, len(times))
        return z
