"""Rounds of samples during training: the same prompts with the same noise every time, so that rounds can be compared.

All ranks take part, since the model is sharded over them: each makes a share of the clips, and a rank whose share is
smaller repeats one and writes nothing, so that all call the model equally often.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import nn

from opensora.config.train import SamplesConfig
from opensora.records import SAMPLES_PREFIX
from opensora.sampling.pipeline import SampleKey, SamplingPipeline
from opensora.sampling.references import VAE
from opensora.sampling.video_io import to_frames, write_image, write_video
from opensora.schedulers.rf import RFLOW
from opensora.schedulers.rf.rectified_flow import TextEncoder
from opensora.sheet import SheetRow, contact_sheet, sheet_row
from opensora.storage import Storage

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Ranks(Protocol):
    """What a round needs of the ranks (`opensora.acceleration.mesh.World`)."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank."""


class _StoppedError(Exception):
    """All ranks have agreed to stop."""


class RoundSampler:
    """Called by the trainer, on all ranks at once, as `sampler(model, step, should_stop)`."""

    def __init__(
        self,
        config: SamplesConfig,
        *,
        run: Storage,
        ranks: Ranks,
        vae: VAE,
        text_encoder: TextEncoder,
        scheduler: RFLOW,
        dtype: torch.dtype,
    ) -> None:
        self.config = config
        self._run = run
        self._ranks = ranks
        self._vae = vae
        self._text_encoder = text_encoder
        self._scheduler = scheduler
        self._dtype = dtype

    def __call__(self, model: nn.Module, step: int, should_stop: Callable[[], bool]) -> None:
        """Write `samples/step-N/` in the run directory: a clip per prompt, and a contact sheet.

        Args:
            model: as it is trained, sharded or not.
            step: of the training.
            should_stop: asked before every model step; all ranks get the same answer. Where it is yes, the round ends
                without its remaining clips and without a sheet.
        """
        folder = self._run.child(f"{SAMPLES_PREFIX}/step-{step:08d}")
        try:
            rows = self._make_clips(model, folder, should_stop)
        except _StoppedError:
            logger.info("samples of step %d left unfinished: asked to stop", step)
            return
        gathered = {index: row for part in self._ranks.gather(rows) for index, row in part.items()}
        if self._ranks.rank == 0 and gathered:
            write_image(folder, "sheet.png", contact_sheet([gathered[index] for index in sorted(gathered)]))
            logger.info("samples of step %d: %s", step, folder.uri)

    def _make_clips(self, model: nn.Module, folder: Storage, should_stop: Callable[[], bool]) -> dict[int, SheetRow]:
        config, prompts = self.config, self.config.prompts
        pipeline = SamplingPipeline(
            model, self._vae, self._text_encoder, self._scheduler, device=self._ranks.device, dtype=self._dtype
        )

        def check(done: int, total: int) -> None:
            if should_stop():
                raise _StoppedError

        rows: dict[int, SheetRow] = {}
        for first in range(0, len(prompts), self._ranks.size):
            index = first + self._ranks.rank
            is_mine = index < len(prompts)
            index = index if is_mine else first
            check(0, 0)
            pixels = pipeline.sample(
                [prompts[index]],
                num_frames=config.num_frames,
                image_size=config.image_size,
                fps=config.fps,
                keys=[SampleKey(seed=config.seed, row=index)],
                num_sampling_steps=config.num_sampling_steps,
                cfg_scale=config.cfg_scale,
                on_step=check,
            )[0]
            if not is_mine:
                continue
            if not bool(pixels.isfinite().all()):
                logger.warning("the sample of %r is not finite and is left out", prompts[index])
                continue
            frames = to_frames(pixels)
            if config.num_frames == 1:
                write_image(folder, f"{index:02d}.png", frames[0])
            else:
                write_video(folder, f"{index:02d}.mp4", frames, config.fps)
            rows[index] = sheet_row(prompts[index], frames)
        return rows
