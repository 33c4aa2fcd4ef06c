"""STDiT3, the spatial-temporal diffusion transformer of Open-Sora 1.2.

Built on DiT ("Scalable diffusion models with transformers", Peebles and Xie, 2022) and PixArt-α/Σ (Chen et al.,
2023-24). Spatial blocks attend within a frame, temporal blocks along time at each place; both attend to the caption.

Shapes: B samples, C width, T latent frames after patching, S = rows x columns patches of a frame. Tokens are kept as
`[B, T, S, C]` throughout: every block gets a view of one axis, and no block transposes the tokens.
The state-dict keys are those of the published checkpoints.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from opensora.config.components import STDiT3Config
from opensora.errors import ConfigError
from opensora.models.layers.attention import CrossAttention, SelfAttention, TextLayout, rotary_table
from opensora.models.layers.embedders import (
    MLP,
    CaptionEmbedder,
    PatchEmbed3D,
    ScalarEmbedder,
    position_embedding,
    unpatchify,
)
from opensora.models.layers.modulation import DropPath, FinalLayer, layer_norm, modulate
from opensora.models.weights import load_weights

Number = int | float | Sequence[int] | Sequence[float] | Tensor
"""A size or rate: one number, or one per sample (of which the sizes use the first: a batch is of one bucket)."""

PUBLISHED_CAPTION_CHANNELS = 4096
PUBLISHED_CAPTION_LENGTH = 300
PUBLISHED_LATENT_CHANNELS = 4

MAX_CACHED_POSITIONS = 64
"""Position embeddings kept for reuse: one per bucket of a training run."""


class STDiT3Block(nn.Module):
    """Self-attention along one axis, cross-attention to the caption, MLP; the first and the last modulated by time."""

    def __init__(self, config: STDiT3Config, *, axis: Literal["spatial", "temporal"], drop_path: float) -> None:
        super().__init__()
        dim = config.hidden_size
        self.scale_shift_table = nn.Parameter(torch.empty(6, dim))
        self.norm1 = layer_norm(dim, fused=config.enable_layernorm_kernel)
        self.attn = SelfAttention(
            dim, config.num_heads, axis=axis, qk_norm=config.qk_norm, flash=config.enable_flash_attn
        )
        self.cross_attn = CrossAttention(dim, config.num_heads)
        self.norm2 = layer_norm(dim, fused=config.enable_layernorm_kernel)
        self.mlp = MLP(dim, int(dim * config.mlp_ratio), dim)
        self.drop_path = DropPath(drop_path)

    def forward(
        self, x: Tensor, text: Tensor, modulation: Tensor, layout: TextLayout, rotary: Tensor | None = None
    ) -> Tensor:
        """`x [B, T, S, C]`, packed `text [n, C]`, `modulation [B, 1 or T, 6, C]` to `[B, T, S, C]`."""
        vectors = (self.scale_shift_table + modulation).unsqueeze(2).unbind(3)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = vectors
        x = torch.addcmul(x, gate_msa, self.drop_path(self.attn(modulate(self.norm1(x), shift_msa, scale_msa), rotary)))
        x = x + self.cross_attn(x, text, layout)
        return torch.addcmul(x, gate_mlp, self.drop_path(self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))))


class STDiT3(nn.Module):
    """The model. Keywords are the fields of `STDiT3Config`.

    Raises:
        ConfigError: an unknown keyword, a combination that cannot work, or apex is asked for and not installed.
        MissingExtraError: flash-attn is asked for and not installed.
    """

    def __init__(self, **keywords: Any) -> None:
        super().__init__()
        self.config = config = _complete(keywords)
        dim = config.hidden_size
        self.in_channels: int = config.in_channels or PUBLISHED_LATENT_CHANNELS
        self.out_channels = 2 * self.in_channels if config.pred_sigma else self.in_channels
        self.patch_size = config.patch_size
        self.x_embedder = PatchEmbed3D(config.patch_size, self.in_channels, dim)
        self.t_embedder = ScalarEmbedder(dim)
        self.fps_embedder = ScalarEmbedder(dim)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.y_embedder = CaptionEmbedder(
            config.caption_channels or PUBLISHED_CAPTION_CHANNELS,
            dim,
            num_tokens=config.model_max_length or PUBLISHED_CAPTION_LENGTH,
        )
        self.rope = RotaryFrequencies(dim // config.num_heads)
        rates = torch.linspace(0, config.drop_path, config.depth, device="cpu").tolist()
        self.spatial_blocks = nn.ModuleList(STDiT3Block(config, axis="spatial", drop_path=rate) for rate in rates)
        self.temporal_blocks = nn.ModuleList(STDiT3Block(config, axis="temporal", drop_path=rate) for rate in rates)
        self.final_layer = FinalLayer(dim, math.prod(config.patch_size) * self.out_channels)
        self._positions: dict[tuple[Any, ...], Tensor] = {}

        self._initialise()
        self._freeze()
        if config.from_pretrained is not None:
            load_weights(self, config.from_pretrained)

    @property
    def blocks(self) -> dict[str, nn.ModuleList]:
        """The lists whose members may be sharded, compiled, or replaced by wrappers."""
        return {"spatial_blocks": self.spatial_blocks, "temporal_blocks": self.temporal_blocks}

    def _initialise(self) -> None:
        """Xavier everywhere; the frame rate and the temporal blocks add nothing until they have learnt something.

        A new model then equals an image model applied to every frame, which is how it is grown from PixArt-Σ.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, STDiT3Block | FinalLayer):
                nn.init.normal_(module.scale_shift_table, std=self.config.hidden_size**-0.5)
        nn.init.normal_(self.fps_embedder.get_parameter("mlp.0.weight"), std=0.02)
        nn.init.zeros_(self.fps_embedder.get_parameter("mlp.2.weight"))
        for block in self.temporal_blocks:
            for name in ("attn.proj.weight", "cross_attn.proj.weight", "mlp.fc2.weight"):
                nn.init.zeros_(block.get_parameter(name))

    def _freeze(self) -> None:
        if self.config.only_train_temporal:
            self.requires_grad_(False)
            self.temporal_blocks.requires_grad_(True)
        if self.config.freeze_y_embedder:
            self.y_embedder.requires_grad_(False)

    def encode_text(
        self, y: Tensor, mask: Tensor | Sequence[int] | None = None, *, drop_text: Tensor | None = None
    ) -> tuple[Tensor, list[int]]:
        """Project the valid tokens of all captions, one after the other, without padding.

        Args:
            y: Token embeddings `[B, 1, L, caption_channels]`.
            mask: Which tokens are valid, `[B, L]`, or the number of valid tokens per caption. Fewer rows than captions
                are repeated (guidance doubles the batch). A mask on a device has to be waited for; numbers need not.
            drop_text: `[B]` bool, captions to replace by the null caption.

        Returns:
            Packed text `[1, sum of lengths, C]`, and the lengths.
        """
        B, _, L, channels = y.shape
        tokens = y.reshape(B * L, channels).to(self.dtype)
        if mask is None:
            index, lengths = None, [L] * B
        else:
            index, lengths = _valid_tokens(mask, num_captions=B, length=L)
        dropped = place = None
        if drop_text is not None:
            if self.y_embedder.y_embedding.shape[0] < L:
                raise ConfigError(
                    f"captions have {L} tokens, the model's null caption has {self.y_embedder.y_embedding.shape[0]}",
                    hint="set model.model_max_length to that of the text encoder",
                )
            rows = torch.arange(B * L) if index is None else index
            dropped = drop_text.to(y.device)[(rows // L).to(y.device, non_blocking=True)]
            place = (rows % L).to(y.device, non_blocking=True)
        if index is not None:
            tokens = tokens.index_select(0, index.to(y.device, non_blocking=True))
        return self.y_embedder(tokens, dropped, place).unsqueeze(0), lengths

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        y: Tensor,
        mask: Tensor | Sequence[int] | None = None,
        x_mask: Tensor | None = None,
        fps: Number | None = None,
        height: Number | None = None,
        width: Number | None = None,
        *,
        drop_text: Tensor | None = None,
        **ignored: Any,
    ) -> Tensor:
        """Predict the velocity (and an unused second half with `pred_sigma`).

        Args:
            x: Noisy latents `[B, in_channels, frames, rows, columns]`.
            timestep: `[B]`, from 0 (data) to 1000 (noise).
            y: Token embeddings `[B, 1, L, caption_channels]`; with `skip_y_embedder` the result of `encode_text`.
            mask: Valid tokens `[B, L]` or their numbers; see `encode_text`.
            x_mask: `[B, frames]` bool; False marks a clean conditioning frame, which is at time 0.
            fps: Frame rate, one or per sample; B / n of them are repeated.
            height: Height of the video in pixels.
            width: Width of the video in pixels.
            drop_text: `[B]` bool, captions to drop; the model's own draw in training mode unless given.
            ignored: What other models take (`num_frames`, `ar`).

        Returns:
            `[B, out_channels, frames, rows, columns]` in at least fp32.

        Sizes and text lengths given as Python numbers or CPU tensors make no device wait.
        """
        if fps is None or height is None or width is None:
            raise ConfigError(
                f"STDiT3 was called with fps={fps}, height={height}, width={width}",
                hint="pass the frame rate and the size of the video in pixels",
            )
        dtype, device = self.dtype, x.device
        B, size = x.shape[0], (x.shape[2], x.shape[3], x.shape[4])

        text, lengths = self._embed_text(y, mask, drop_text)
        layout = TextLayout.build(lengths, device=device)

        fps_embedding = self._embed_fps(fps, B, device)
        time = self.t_embedder(timestep, dtype=dtype) + fps_embedding
        modulation = self.t_block(time).view(B, 1, 6, -1)
        time_zero = None
        if x_mask is not None:
            time_zero = self.t_embedder(torch.zeros_like(timestep), dtype=dtype) + fps_embedding
            modulation_zero = self.t_block(time_zero).view(B, 1, 6, -1)
            modulation = torch.where(x_mask[:, :, None, None], modulation, modulation_zero)

        x = self.x_embedder(x.to(dtype))
        x = x + self._position_embedding(size, height, width, device)
        rotary = rotary_table(x.shape[1], self.config.hidden_size // self.config.num_heads, device=device, dtype=dtype)
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            x = spatial(x, text, modulation, layout)
            x = temporal(x, text, modulation, layout, rotary)
        x = self.final_layer(x, time, frame_mask=x_mask, time_zero=time_zero)
        x = unpatchify(x, self.patch_size, size)
        return x.to(torch.promote_types(dtype, torch.float32))

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in: the type of its weights at the time of the call."""
        return self.x_embedder.proj.weight.dtype

    def _embed_text(
        self, y: Tensor, mask: Tensor | Sequence[int] | None, drop_text: Tensor | None
    ) -> tuple[Tensor, list[int]]:
        if self.config.skip_y_embedder:
            if mask is None:
                raise ConfigError(
                    "STDiT3 with skip_y_embedder=True was called without mask",
                    hint="pass the caption lengths that `encode_text` returned",
                )
            return y.to(self.dtype).flatten(0, -2), torch.as_tensor(mask).long().tolist()
        if drop_text is None and self.training and self.config.class_dropout_prob > 0:
            drop_text = torch.rand(y.shape[0], device=y.device) < self.config.class_dropout_prob
        text, lengths = self.encode_text(y, mask, drop_text=drop_text)
        return text.squeeze(0), lengths

    def _embed_fps(self, fps: Number, batch: int, device: torch.device) -> Tensor:
        values = torch.as_tensor(fps).to(device, non_blocking=True).reshape(-1)
        embedding: Tensor = self.fps_embedder(values, dtype=self.dtype)
        return embedding if values.shape[0] == batch else embedding.repeat(batch // values.shape[0], 1)

    def _position_embedding(
        self, size: tuple[int, int, int], height: Number, width: Number, device: torch.device
    ) -> Tensor:
        rows, columns = (-(-n // p) for n, p in zip(size[1:], self.patch_size[1:], strict=True))
        scale = math.sqrt(_first(height) * _first(width)) / self.config.input_sq_size
        key = (rows, columns, scale, device, self.dtype)
        if key not in self._positions:
            if len(self._positions) == MAX_CACHED_POSITIONS:
                self._positions.pop(next(iter(self._positions)))
            self._positions[key] = position_embedding(
                rows,
                columns,
                self.config.hidden_size,
                scale=scale,
                base_size=round(math.sqrt(rows * columns)),
                device=device,
                dtype=self.dtype,
            )
        return self._positions[key]


class RotaryFrequencies(nn.Module):
    """Holds the frequencies that published checkpoints carry.

    The angles are computed from the formula in fp64 instead, since frequencies rounded to bf16 misplace late frames.
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2).float() / head_dim)
        self.freqs = nn.Parameter(frequencies, requires_grad=False)


def _complete(keywords: dict[str, Any]) -> STDiT3Config:
    """Settings from constructor keywords."""
    known = {field.name for field in dataclasses.fields(STDiT3Config)}
    unknown = sorted(set(keywords) - known)
    if unknown:
        raise ConfigError(f"STDiT3 has no setting {unknown[0]!r}", hint=f"known: {', '.join(sorted(known))}")
    tuples: dict[str, Any] = {name: tuple(keywords[name]) for name in ("patch_size", "input_size") if name in keywords}
    config = STDiT3Config(**{**keywords, **tuples})
    if config.enable_sequence_parallelism:
        raise ConfigError(
            "model.enable_sequence_parallelism=True: sequence parallelism is not available yet",
            hint="leave it out",
        )
    return config


def _valid_tokens(mask: Tensor | Sequence[int], *, num_captions: int, length: int) -> tuple[Tensor | None, list[int]]:
    """Places of the valid tokens in a flattened `[num_captions, length]` batch (`None`: all), and their numbers."""
    if isinstance(mask, Tensor) and mask.ndim > 1:
        valid = mask.detach().cpu().reshape(mask.shape[0], -1).ne(0)
    else:
        valid = torch.arange(length) < torch.as_tensor(mask).cpu().unsqueeze(1)
    if num_captions % valid.shape[0] or valid.shape[1] != length:
        raise ConfigError(
            f"a text mask of shape {list(valid.shape)} does not fit captions of shape {[num_captions, length]}",
            hint="pass one row per caption, or one per pair of captions with guidance",
        )
    valid = valid.repeat(num_captions // valid.shape[0], 1)
    lengths: list[int] = valid.sum(1).tolist()
    if min(lengths) == length:
        return None, lengths
    return valid.flatten().nonzero().squeeze(1), lengths


def _first(value: Number) -> float:
    """The first of the values; a batch is of one size."""
    if isinstance(value, Tensor):
        return float(value.flatten()[0])
    return float(value if isinstance(value, int | float) else value[0])


def STDiT3_XL_2(from_pretrained: str | None = None, **keywords: Any) -> STDiT3:  # noqa: N802 - the published name
    """1.2 billion parameters."""
    return _of_type("STDiT3-XL/2", from_pretrained=from_pretrained, **keywords)


def STDiT3_3B_2(from_pretrained: str | None = None, **keywords: Any) -> STDiT3:  # noqa: N802 - the published name
    """3.2 billion parameters."""
    return _of_type("STDiT3-3B/2", from_pretrained=from_pretrained, **keywords)


def _of_type(name: str, **keywords: Any) -> STDiT3:
    """The sizes of a named type; the configuration refuses keywords that contradict them."""
    sizes: Mapping[str, Any] = STDiT3Config.TYPES[name]
    return STDiT3(**{**sizes, **keywords, "type": name})
