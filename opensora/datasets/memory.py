"""What a rank's memory holds while STDiT3 is trained, from sizes alone: an estimate, where a search measures.

Exact are the numbers of parameters, and with them weights, gradients, optimiser and averages. Activations are those
tensors that autograd keeps for the backward pass; `tests/unit/opensora/test_memory.py` compares both with the model.
Not in it: temporaries of kernels and collectives, the encoded clip itself, the VAE, CUDA's own memory, and what the
allocator wastes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from opensora.config.components import HashTextConfig
from opensora.config.train import TrainConfig
from opensora.datasets.batch_table import micro_batches_per_rank
from opensora.datasets.bucket import BucketShape
from opensora.datasets.cost import clip_tokens

_FREQUENCIES = 256
"""Input width of the embedders of time and frame rate."""
_MINILM_WIDTH = 384
_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model."""

    total: int
    trainable: int
    per_block: int


def count_parameters(config: TrainConfig) -> ParameterCounts:
    """The parameters of the model that a config trains: sums of the shapes in `models/stdit/stdit3.py`."""
    model, width = config.model, config.model.hidden_size
    hidden = int(width * model.mlp_ratio)
    block = (
        6 * width  # scale_shift_table
        + _linear(width, 3 * width) + _linear(width, width)  # self-attention
        + (2 * (width // model.num_heads) if model.qk_norm else 0)
        + _linear(width, width) + _linear(width, 2 * width) + _linear(width, width)  # cross-attention
        + _linear(width, hidden) + _linear(hidden, width)
    )  # fmt: skip
    channels = config.vae.channels
    patch = math.prod(model.patch_size)
    captions = _linear(_caption_width(config), width) + _linear(width, width)
    rest = (
        _linear(patch * channels, width)
        + 2 * (_linear(_FREQUENCIES, width) + _linear(width, width))  # time, frame rate
        + _linear(width, 6 * width)
        + 2 * width + _linear(width, patch * channels * (2 if model.pred_sigma else 1))  # final layer
    )  # fmt: skip
    blocks, frequencies = 2 * model.depth * block, width // model.num_heads // 2
    trainable = blocks // 2 if model.only_train_temporal else blocks + rest
    if not (model.only_train_temporal or model.freeze_y_embedder):
        trainable += captions
    return ParameterCounts(blocks + rest + captions + frequencies, trainable, block)


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _caption_width(config: TrainConfig) -> int:
    encoder = config.text_encoder
    return encoder.output_dim if isinstance(encoder, HashTextConfig) else _MINILM_WIDTH


@dataclass(frozen=True, kw_only=True)
class StateBytes:
    """Bytes of a rank that do not depend on the clips."""

    weights: int
    """Master weights, of which a rank has its shard."""
    gathered: int
    """Weights in the type of computing: all of them with zero2, two blocks' with zero3."""
    gradients: int
    """Shards; with zero2 and several micro-batches in a step also whole ones."""
    optimizer: int
    """AdamW's two moments, sharded."""
    averages: int
    """Moving average of the weights, sharded; 0 where none is kept."""

    @property
    def total(self) -> int:
        return self.weights + self.gathered + self.gradients + self.optimizer + self.averages


def state_bytes(config: TrainConfig, *, ranks: int) -> StateBytes:
    """What a rank of so many holds all the time."""
    counts, shards = count_parameters(config), max(1, ranks // config.parallel.replicas)
    master = 8 if config.dtype == "fp64" else 4
    shard = -(-counts.trainable // shards) * master
    keeps_all = config.parallel.sharding == "zero2"
    gathered = counts.total if keeps_all else min(counts.total, 2 * counts.per_block)
    accumulates = keeps_all and micro_batches_per_rank(config, ranks=ranks) > 1
    return StateBytes(
        weights=-(-counts.total // shards) * master,
        gathered=gathered * _BYTES[config.dtype],
        gradients=shard + (counts.trainable * master if accumulates else 0),
        optimizer=2 * shard,
        averages=0 if config.optim.ema_decay is None else shard,
    )


def activation_bytes_per_clip(config: TrainConfig, shape: BucketShape) -> int:
    """What autograd keeps of one clip, for attention that does not store its matrix.

    In widths C per video token of a block, with an MLP of ratio r. Self-attention: the block's input, normalised input,
    modulated input, queries, keys and values, normalised queries and keys, output, projected output: 10; along time the
    values are copied: 1 more. Without norm of queries and keys: 8 along the rows, and 8 along time, where the rotated
    ones and the copy are kept instead. On a CPU, where the norm has no kernel of its own: 2 more. Cross-attention:
    input, queries, output: 3. MLP: input, normalised, modulated, before and after GELU, output: 4 + 2 r. Per caption
    token of a block: keys and values, 2. The last layer: 3. With activation checkpointing, of each block its input
    alone, and one block whole.
    """
    model = config.model
    time, space = clip_tokens(num_frames=shape.num_frames, height=shape.height, width=shape.width, model=model)
    tokens, text = time * space, config.text_encoder.model_max_length
    others = 7 + 2 * model.mlp_ratio + (2 if model.qk_norm and config.device == "cpu" else 0)
    spatial = tokens * ((10 if model.qk_norm else 8) + others) + 2 * text
    temporal = tokens * ((11 if model.qk_norm else 8) + others) + 2 * text
    if config.parallel.activation_checkpointing == "full":
        kept = 2 * model.depth * tokens + max(spatial, temporal)
    else:
        kept = model.depth * (spatial + temporal)
    return round((kept + 3 * tokens) * model.hidden_size * _BYTES[config.dtype])


def largest_shape(config: TrainConfig, shapes: list[BucketShape]) -> BucketShape:
    """The shape with most tokens: of a bucket's ratios the one that needs most."""

    def tokens(shape: BucketShape) -> int:
        time, space = clip_tokens(
            num_frames=shape.num_frames, height=shape.height, width=shape.width, model=config.model
        )
        return time * space

    return max(shapes, key=tokens)
