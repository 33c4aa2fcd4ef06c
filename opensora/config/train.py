"""Settings of a training run. The dataclass tree is the only place where they, their types and defaults are written.

The string below each field is its documentation: `--help` and the reference page are made from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from opensora.config.components import (
    CodecConfig,
    HashTextConfig,
    ModelConfig,
    RFlowConfig,
    SchedulerConfig,
    STDiT3Config,
    TextEncoderConfig,
    VAEConfig,
)
from opensora.errors import ConfigError

BucketTable = dict[str, dict[int, tuple[Any, int | None]]]
"""Resolution name → number of frames → (keep probability or (p_size, p_frames), batch size or None)."""

DType = Literal["fp64", "fp32", "bf16", "fp16"]

MASK_NAMES = (
    "identity", "quarter_random", "quarter_head", "quarter_tail", "quarter_head_tail",
    "image_random", "image_head", "image_tail", "image_head_tail", "random", "intepolate",
)  # fmt: skip
"""Frame-conditioning masks, with Open-Sora's spelling."""


@dataclass(frozen=True, kw_only=True)
class StorageConfig:
    """How object stores are reached. Endpoint and credentials come from the standard `AWS_*` variables."""

    endpoint_url: str | None = None
    """Endpoint of an S3-compatible store; `AWS_ENDPOINT_URL_S3` or `AWS_ENDPOINT_URL` unless given."""
    connect_timeout_seconds: float = 5.0
    """Longest wait for a connection."""
    read_timeout_seconds: float = 30.0
    """Longest silence during a transfer."""
    retry_deadline_seconds: float = 300.0
    """How long an operation is retried on throttling and outages before it fails."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which clips are read, and how."""

    path: str
    """Catalogue: a CSV or Parquet file, local or in a bucket."""
    root: str | None = None
    """Folder that relative paths of the catalogue start from; the catalogue's own folder unless given."""
    bucket_config: BucketTable = field(default_factory=dict)
    """Resolution → frames → (probability, batch size), in Open-Sora's syntax."""
    batch_table: str | None = None
    """Table of `python -m opensora.search_batch_size`, local or in a bucket: its batch sizes replace those of
    `bucket_config`. They are written into the run's `config.yaml`, which therefore needs no table."""
    frame_interval: int = 1
    """Every n-th frame of a clip is used."""
    transform: Literal["resize_crop", "center"] = "resize_crop"
    """How a clip is brought to the size of its bucket."""
    repeats: int = 1
    """How often each row appears in an epoch, each time with its own draws; for small catalogues."""
    drop_last: bool = True
    """Drop the rows of a bucket that do not fill a batch; otherwise the last batch is smaller."""
    shuffle: bool = True
    """Draw a new order every epoch."""
    bad_clip: Literal["fail", "skip"] = "fail"
    """What to do about a clip that cannot be read: end the run, or leave it out and count it."""
    max_skips: int = 100
    """With `bad_clip=skip`: end the run when an attempt had to leave out more different clips than this."""
    num_threads: int = 2
    """Threads per rank that read and decode clips."""
    prefetch_batches: int = 3
    """Micro-batches per rank that are read ahead."""
    cache_dir: str | None = None
    """Local folder for copies of clips that are read often; none unless given."""
    cache_gib: float = 10.0
    """Size limit of that folder."""

    def __post_init__(self) -> None:
        for name in ("frame_interval", "repeats", "num_threads", "prefetch_batches"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.{name}={getattr(self, name)} is below 1", hint="use a whole number from 1")


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long to train and how a step is made."""

    steps: int | None = None
    """Optimiser steps in all; `epochs` decides when not given."""
    epochs: int | None = None
    """Passes over the catalogue; `steps` decides when not given."""
    micro_batches_per_step: int | None = None
    """Micro-batches in one optimiser step, over all ranks. The number of data-parallel ranks x
    `accumulation` of the first attempt unless given; recorded in the run, and kept when the ranks change."""
    accumulation: int = 1
    """Micro-batches per rank and step, where `micro_batches_per_step` is not given."""
    balance_window: int = 64
    """Steps within which micro-batches are grouped by cost."""
    loss_weighting: Literal["micro_batch", "sample", "token"] = "micro_batch"
    """What the step's loss is the mean over."""
    mask_ratios: dict[str, float] | None = None
    """Frame-conditioning mask → its share of the samples; the rest is unmasked."""
    log_every: int = 10
    """Steps between lines of the log."""

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ConfigError(
                f"train.steps={self.steps} and train.epochs={self.epochs}: exactly one of them ends the run",
                hint="set one, remove the other (train.epochs=null)",
            )
        for name in ("steps", "epochs", "micro_batches_per_step", "accumulation", "balance_window", "log_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"train.{name}={value} is below 1", hint="use a whole number from 1")
        for name, ratio in (self.mask_ratios or {}).items():
            if name not in MASK_NAMES:
                raise ConfigError(f"train.mask_ratios.{name}: unknown mask", hint=f"known: {', '.join(MASK_NAMES)}")
            if not 0 <= ratio <= 1:
                raise ConfigError(f"train.mask_ratios.{name}={ratio} is not within 0 and 1", hint="use a share")
        total = sum((self.mask_ratios or {}).values())
        if total > 1 + 1e-6:
            raise ConfigError(f"train.mask_ratios add up to {total:g}", hint="lower them to at most 1 in all")
        if self.mask_ratios and "identity" in self.mask_ratios and not math.isclose(total, 1, abs_tol=1e-6):
            raise ConfigError(
                f"train.mask_ratios with `identity` add up to {total:g}", hint="make it 1, or leave `identity` out"
            )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its learning rate."""

    lr: float = 1e-4
    """Learning rate after warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    warmup_steps: int = 0
    """Steps of linear warm-up: lr x (step + 1) / (warmup_steps + 1)."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Learning rate after warm-up; `cosine` and `linear` fall to `min_lr` at the last step and need `train.steps`."""
    min_lr: float = 0.0
    """Where `cosine` and `linear` end."""
    grad_clip: float = 0.0
    """Largest norm of the gradient; 0 switches clipping off."""
    ema_decay: float | None = 0.9999
    """Decay of the moving average of the weights; null keeps none."""

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ConfigError(f"optim.lr={self.lr} is not positive", hint="1e-4 is a usual start")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ConfigError(
                f"optim.ema_decay={self.ema_decay} is not within 0 and 1", hint="0.99 to 0.9999 are usual"
            )
        for name in ("warmup_steps", "grad_clip", "weight_decay", "eps"):
            if getattr(self, name) < 0:
                raise ConfigError(f"optim.{name}={getattr(self, name)} is negative", hint="use 0 or more")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is spread over ranks and how its memory is saved. None of these changes what is computed."""

    sharding: Literal["zero2", "zero3"] = "zero2"
    """`zero3` shards the weights as well; `zero2` gathers them once per step."""
    replicas: int = 1
    """Groups of ranks that each hold all shards (hybrid sharding)."""
    sequence: int = 1
    """Ranks that share one sample (sequence parallelism)."""
    activation_checkpointing: Literal["none", "full"] = "none"
    """`full` keeps only the input of each block and computes the rest again in the backward pass."""
    num_cpu_threads: int | None = None
    """PyTorch threads per rank; the machine's cores divided by its ranks unless given."""
    collective_timeout_seconds: float = 1800.0
    """Longest wait inside a collective operation."""

    def __post_init__(self) -> None:
        if self.sequence != 1:
            raise ConfigError(
                f"parallel.sequence={self.sequence}: sequence parallelism is not available for training yet",
                hint="use parallel.sequence=1",
            )
        if self.replicas < 1:
            raise ConfigError(f"parallel.replicas={self.replicas} is below 1", hint="use 1 for one group")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state is saved, and what is kept."""

    every_steps: int = 500
    """Steps between checkpoints; 0 saves only at the end and when asked to stop."""
    keep_last: int = 2
    """Newest complete checkpoints to keep."""
    keep_every_steps: int = 0
    """Besides, keep every checkpoint whose step is a multiple of this; 0 keeps none."""
    load: str | None = None
    """Checkpoint of another run to start from: its model, EMA and optimiser. Ignored once the run has its own."""
    load_weights_only: bool = False
    """Take only the weights from `load`."""
    export: bool = True
    """Write the final weights (EMA if kept) as safetensors with the published keys."""
    stop_deadline_seconds: float = 600.0
    """Time after SIGTERM within which the step is finished and saved."""

    def __post_init__(self) -> None:
        if self.keep_last < 1:
            raise ConfigError(f"checkpoint.keep_last={self.keep_last} is below 1", hint="keep at least the newest")
        for name in ("every_steps", "keep_every_steps"):
            if getattr(self, name) < 0:
                raise ConfigError(f"checkpoint.{name}={getattr(self, name)} is negative", hint="0 switches it off")


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """The loss on clips that are not trained on."""

    every_steps: int = 0
    """Steps between validations; 0 switches them off."""
    path: str | None = None
    """Catalogue of the held-out clips."""
    bucket_config: BucketTable | None = None
    """Buckets of the held-out clips; those of the training data unless given."""
    num_timesteps: int = 10
    """Evenly spaced times at which each clip's loss is measured."""
    max_batches: int = 50
    """Micro-batches per validation, over all ranks; rounded up to whole steps."""

    def __post_init__(self) -> None:
        if self.every_steps and not self.path:
            raise ConfigError(
                f"validation.every_steps={self.every_steps} without validation.path",
                hint="name a catalogue of held-out clips, or set validation.every_steps=0",
            )


@dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    """Clips sampled during training."""

    every_steps: int = 0
    """Steps between rounds of samples; 0 switches them off."""
    prompts: tuple[str, ...] = ()
    """What to sample."""
    num_frames: int = 17
    """Frames per clip."""
    image_size: tuple[int, int] = (64, 64)
    """Height and width in pixels."""
    fps: int = 24
    """Frame rate the model is told, and that of the file."""
    num_sampling_steps: int | None = None
    """Steps; the scheduler's unless given."""
    cfg_scale: float | None = None
    """Guidance; the scheduler's unless given."""
    seed: int = 0
    """Seed of the noise: the same every time, so that rounds can be compared."""

    def __post_init__(self) -> None:
        if self.every_steps and not self.prompts:
            raise ConfigError(
                f"samples.every_steps={self.every_steps} without samples.prompts",
                hint="give at least one prompt, or set samples.every_steps=0",
            )


@dataclass(frozen=True, kw_only=True)
class WatchdogConfig:
    """When a run counts as stalled."""

    factor: float = 10.0
    """A step may take this many times the usual step time."""
    floor_seconds: float = 420.0
    """No step counts as stalled before this time, which must leave room for an outage of the object store
    (`storage.retry_deadline_seconds`)."""
    startup_seconds: float = 1800.0
    """Longest time from the start to the end of the first step."""


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What is reported besides the run directory."""

    wandb: bool = False
    """Log to Weights & Biases as well (needs the package `wandb`)."""
    progress_url: str | None = None
    """Send `progress.json` to this `http://` or `https://` URL as well, by POST, at most once a second."""
    flush_seconds: float = 10.0
    """Seconds between uploads of metrics, logs and TensorBoard files."""

    def __post_init__(self) -> None:
        if self.progress_url is not None and not self.progress_url.startswith(("http://", "https://")):
            raise ConfigError(
                f"report.progress_url={self.progress_url!r} is no HTTP address",
                hint="begin it with http:// or https://",
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that defines a training run."""

    run_uri: str
    """Run directory: a local folder or `s3://bucket/prefix`. The same directory continues the run."""
    seed: int = 1024
    """Seed of every draw."""
    dtype: DType = "bf16"
    """Compute type; `fp16` samples and does not train. Master weights, reduction of gradients and optimiser are fp32
    (fp64 with `fp64`)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; `auto` takes a GPU when there is one."""
    model: ModelConfig = field(default_factory=STDiT3Config)
    """The diffusion model."""
    vae: VAEConfig = field(default_factory=CodecConfig)
    """From pixels to latents."""
    text_encoder: TextEncoderConfig = field(default_factory=HashTextConfig)
    """From captions to token embeddings."""
    scheduler: SchedulerConfig = field(default_factory=RFlowConfig)
    """The diffusion process."""
    data: DataConfig
    """The clips."""
    train: LoopConfig
    """The loop."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimiser."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Ranks and memory."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """Held-out loss."""
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    """Clips sampled while training."""
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    """Stalls."""
    report: ReportConfig = field(default_factory=ReportConfig)
    """Reporting."""
    storage: StorageConfig = field(default_factory=StorageConfig)
    """Object stores."""

    def __post_init__(self) -> None:
        if self.optim.schedule != "constant" and self.train.steps is None:
            raise ConfigError(
                f"optim.schedule={self.optim.schedule!r} without train.steps: the last step is not known",
                hint="set train.steps instead of train.epochs",
            )
        if self.dtype == "fp16":
            raise ConfigError(
                "dtype='fp16': small gradients would vanish, since losses are not scaled", hint="train with dtype=bf16"
            )
        if self.watchdog.floor_seconds <= self.storage.retry_deadline_seconds:
            raise ConfigError(
                f"watchdog.floor_seconds={self.watchdog.floor_seconds:g} is not above storage.retry_deadline_seconds="
                f"{self.storage.retry_deadline_seconds:g}: an outage of the object store would count as a stall",
                hint="raise the first or lower the second",
            )
        if not self.data.bucket_config:
            raise ConfigError(
                "data.bucket_config is empty: no clip would be used", hint='for example {"240p": {51: [1.0, 2]}}'
            )
