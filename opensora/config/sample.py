"""Settings of sampling. Names are those of Open-Sora's flags and inference configs; what differs is said at the field.

The string below each field is its documentation: `--help` and the reference page are made from it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from opensora.config.components import ModelConfig, SchedulerConfig, TextEncoderConfig, VAEConfig
from opensora.config.train import DType, StorageConfig
from opensora.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Everything that defines what is sampled, from which weights, and where it goes."""

    run: str | None = None
    """Run directory to sample from: models, weights, and the sizes below that are not given come from it."""
    step: int | Literal["latest"] = "latest"
    """Which checkpoint of the run."""
    use_ema: bool = True
    """Take the moving average of the weights, where the run keeps one."""
    ckpt_path: str | None = None
    """Weights of the model: a file or folder, local or in a bucket; instead of those of the run or of
    `model.from_pretrained`."""
    model: ModelConfig | None = None
    """The diffusion model; the run's unless given."""
    vae: VAEConfig | None = None
    """From latents to pixels; the run's unless given."""
    text_encoder: TextEncoderConfig | None = None
    """From prompts to token embeddings; the run's unless given."""
    scheduler: SchedulerConfig | None = None
    """The diffusion process; the run's unless given."""
    flash_attn: bool | None = None
    """Replaces `model.enable_flash_attn`."""
    layernorm_kernel: bool | None = None
    """Replaces `model.enable_layernorm_kernel`."""
    dtype: DType | None = None
    """Compute type; the run's unless given, bf16 without a run."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to sample; `auto` takes a GPU when there is one."""
    seed: int = 1024
    """Seed of the noise. A clip's noise depends on the seed, its index and its number `k` among `num_sample`, not on
    the batch that it is sampled in."""

    prompt: tuple[str, ...] | None = None
    """What to sample. `|0|first|2|then` changes the text between loops; a JSON tail such as
    `{"reference_path": "a.png", "mask_strategy": "0"}` conditions on pictures or clips."""
    prompt_path: str | None = None
    """File of prompts, one a line, or a catalogue (CSV or Parquet) whose `text` column holds them; local or in a
    bucket."""
    start_index: int = 0
    """First prompt of the file that is used, counted from 0; files are numbered from here."""
    end_index: int | None = None
    """Prompt of the file before which to stop; all unless given."""
    num_sample: int = 1
    """Clips per prompt, each with noise of its own."""
    batch_size: int = 1
    """Clips sampled together."""

    num_frames: int | str | None = None
    """Frames per clip: a number, or Open-Sora's `1x` to `16x` and `2s` to `32s`; the run's `samples.num_frames` unless
    given."""
    image_size: tuple[int, int] | None = None
    """Height and width in pixels; wins over `resolution` and `aspect_ratio`. The run's `samples.image_size` unless
    either is given."""
    resolution: str | None = None
    """Name of a resolution such as `240p`; together with `aspect_ratio`."""
    aspect_ratio: str | None = None
    """Shape such as `9:16` (Open-Sora's order: height to width); together with `resolution`."""
    fps: int | None = None
    """Frame rate that the model is told; the run's `samples.fps` unless given, 24 without a run."""
    frame_interval: int = 1
    """Every how many frames the clip stands for; the frame rate of the file is `fps // frame_interval`."""
    save_fps: int | None = None
    """Frame rate of the file, instead."""
    multi_resolution: Literal["STDiT2", "OpenSora", "PixArtMS"] | None = "STDiT2"
    """Which sizes the model is told: STDiT2 and OpenSora take height, width, frames, aspect ratio and frame rate."""

    num_sampling_steps: int | None = None
    """Steps; the scheduler's unless given."""
    cfg_scale: float | None = None
    """Strength of classifier-free guidance; the scheduler's unless given."""

    reference_path: tuple[str, ...] | None = None
    """For each prompt, pictures or clips to condition on, separated by `;`."""
    mask_strategy: tuple[str, ...] | None = None
    """For each prompt, where references go, in groups separated by `;`:
    `loop,reference,reference start,target start,length,edit ratio`, in latent frames."""
    align: int | None = None
    """Snap the starts in mask strategies to multiples of this many latent frames; 5 for the VAE of Open-Sora 1.2."""
    loop: int = 1
    """Clips in a row, each continuing the one before."""
    condition_frame_length: int = 5
    """Latent frames that a loop takes over from the clip before; a multiple of 5."""
    condition_frame_edit: float = 0.0
    """How far a loop may change those frames: 0 keeps them, 1 makes them anew."""

    aes: float | None = None
    """Aesthetic score to append to every prompt."""
    flow: float | None = None
    """Motion score to append to every prompt."""
    camera_motion: str | None = None
    """Camera motion to append to every prompt, for example `pan right`."""

    clean_prompts: bool = True
    """Bring prompts to the plain lower-case words that published models were trained on; switch it off for a model
    that was trained on captions as they are."""

    save_dir: str = "./samples"
    """Folder of the results, local or in a bucket. Clips that are there already, made with the same settings, are not
    sampled again."""
    sample_name: str | None = None
    """First part of the file names; `sample` unless given, and nothing with `prompt_as_path`."""
    prompt_as_path: bool = False
    """Name the files after their prompts."""
    sheet: bool = True
    """Write a contact sheet of all clips, and show it when the output is a terminal."""
    sheet_only: bool = False
    """Sample nothing: write the contact sheet of clips that are there already, for example those of several shards."""
    shard: str | None = None
    """Make only a part of the clips: `0/4` is the first of four. The parts together make the same files as one job; the
    last one to end writes the contact sheet. In a Kubernetes Job, `OPENSORA_NUM_SHARDS` and `JOB_COMPLETION_INDEX` say
    the same."""
    verbose: int = 1
    """0 reports nothing, 1 the clips, 2 the steps and prompts too."""
    storage: StorageConfig = field(default_factory=StorageConfig)
    """Object stores."""

    def __post_init__(self) -> None:
        self._check_origin()
        self._check_prompts()
        self._check_sizes()
        if self.shard is not None:
            parse_shard(self.shard)
        for name in (
            "num_sample",
            "batch_size",
            "frame_interval",
            "fps",
            "save_fps",
            "num_sampling_steps",
            "loop",
            "align",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} is below 1", hint="use a whole number from 1")
        if self.condition_frame_length < 5 or self.condition_frame_length % 5:
            raise ConfigError(
                f"condition_frame_length={self.condition_frame_length} is not a multiple of 5",
                hint="17 frames are 5 latent frames; use 5, 10, …",
            )
        if not 0 <= self.condition_frame_edit <= 1:
            raise ConfigError(
                f"condition_frame_edit={self.condition_frame_edit} is not within 0 and 1", hint="0 keeps the frames"
            )

    def _check_origin(self) -> None:
        if self.run is None:
            missing = [name for name in ("model", "vae", "text_encoder", "scheduler") if getattr(self, name) is None]
            if missing:
                raise ConfigError(
                    f"{', '.join(missing)} not set: without a run, the config must hold them",
                    hint="name a run directory (--run DIR), or give a config file",
                )
            if self.step != "latest":
                raise ConfigError(f"step={self.step} without a run", hint="name the run directory: --run DIR")
        if isinstance(self.step, int) and self.step < 0:
            raise ConfigError(f"step={self.step} is negative", hint="use the step of a checkpoint, or latest")

    def _check_prompts(self) -> None:
        if self.prompt is not None and self.prompt_path is not None:
            raise ConfigError(
                f"prompt_path={self.prompt_path!r} together with prompt: only one of them can be used",
                hint="remove one (prompt_path=null)",
            )
        if not self.prompt and self.prompt_path is None:
            raise ConfigError("neither prompt nor prompt_path is set", hint='for example --prompt "a waterfall"')
        if self.start_index < 0 or (self.end_index is not None and self.end_index <= self.start_index):
            raise ConfigError(
                f"start_index={self.start_index} with end_index={self.end_index}: no prompt is between them",
                hint="start from 0; end_index is the first one left out",
            )
        for name in ("reference_path", "mask_strategy"):
            value = getattr(self, name)
            if value is not None and self.prompt is not None and len(value) != len(self.prompt):
                raise ConfigError(
                    f"{name} has {len(value)} entries for {len(self.prompt)} prompts",
                    hint='one entry a prompt; "" for none',
                )

    def _check_sizes(self) -> None:
        if (self.resolution is None) != (self.aspect_ratio is None):
            raise ConfigError(
                f"resolution={self.resolution!r} with aspect_ratio={self.aspect_ratio!r}: each needs the other",
                hint="for example --resolution 240p --aspect-ratio 9:16, or --image-size 240 426",
            )
        if self.image_size is not None and min(self.image_size) < 1:
            raise ConfigError(f"image_size={self.image_size} is below 1", hint="height and width in pixels")
        if self.run is None and self.image_size is None and self.resolution is None:
            raise ConfigError(
                "neither image_size nor resolution is set", hint="for example --resolution 240p --aspect-ratio 9:16"
            )
        if self.run is None and self.num_frames is None:
            raise ConfigError("num_frames is not set", hint="for example --num-frames 51; 1 makes a picture")
        if self.num_frames is not None and not re.fullmatch(
            r"[1-9][0-9]*|(1|2|4|8|16)x|(2|4|8|16|32)s", str(self.num_frames)
        ):
            raise ConfigError(
                f"num_frames={self.num_frames!r} is neither a number from 1 nor a length such as 2s or 4x",
                hint="for example 51",
            )


def parse_shard(text: str) -> tuple[int, int]:
    """(number from 0, shards in all) of `0/4`.

    Raises:
        ConfigError: it is none.
    """
    found = re.fullmatch("([0-9]{1,6})/([0-9]{1,6})", text)
    if found is None or int(found[1]) >= int(found[2]):
        raise ConfigError(f"shard={text!r} is no part of a job", hint="0/4 is the first of four, 3/4 the last")
    return int(found[1]), int(found[2])
