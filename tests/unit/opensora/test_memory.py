"""The estimate of memory against the model itself: its parameters, and what autograd keeps."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import nn

from opensora.config.load import parse_train_config
from opensora.config.train import TrainConfig
from opensora.datasets.bucket import Bucket
from opensora.datasets.memory import activation_bytes_per_clip, count_parameters, largest_shape, state_bytes
from opensora.models.stdit.stdit3 import STDiT3

CONFIG = "run_uri: /r\ndata: {path: c.csv, bucket_config: {144p: {17: [1.0, 2]}}}\ntrain: {steps: 10}\n"


def config_of(*overrides: str) -> TrainConfig:
    return parse_train_config(CONFIG, source="test", overrides=overrides)


def model_of(config: TrainConfig) -> STDiT3:
    sizes = {"in_channels": config.vae.channels, "caption_channels": getattr(config.text_encoder, "output_dim", 384)}
    length = {"model_max_length": config.text_encoder.model_max_length}
    return STDiT3(**{**asdict(config.model), **sizes, **length})


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.type=STDiT3-XL/2"],
        ["model.type=STDiT3-3B/2", "model.depth=28", "model.hidden_size=1872", "model.num_heads=26"],
        ["model.qk_norm=false", "model.pred_sigma=false", "model.patch_size=[2,2,2]", "vae.channels=3"],
        ["model.only_train_temporal=true"],
        ["model.freeze_y_embedder=true", "model.mlp_ratio=2.5"],
        ["text_encoder.type=minilm"],
    ],
    ids=str,
)
def test_parameters_are_those_of_the_model(overrides: list[str]) -> None:
    config = config_of(*overrides)
    with torch.device("meta"):
        model = model_of(config)
    counts = count_parameters(config)
    assert counts.total == sum(parameter.numel() for parameter in model.parameters())
    assert counts.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counts.per_block == sum(parameter.numel() for parameter in model.spatial_blocks[0].parameters())


def kept_bytes(config: TrainConfig, *, height: int, width: int, latent: tuple[int, int, int]) -> int:
    """Bytes of the tensors that autograd keeps of one clip, weights left out."""
    model = model_of(config).train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    alive: list[torch.Tensor] = []
    text = torch.randn(1, 1, config.text_encoder.model_max_length, 64)
    fused: Any = nn.attention.sdpa_kernel(nn.attention.SDPBackend.FLASH_ATTENTION)
    with fused, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(
            torch.randn(1, config.vae.channels, *latent), torch.rand(1), text, fps=24.0, height=height, width=width,
            drop_text=torch.zeros(1, dtype=torch.bool),
        )  # fmt: skip
    return sum(kept.values())


@pytest.mark.parametrize("norm", ["true", "false"])
@pytest.mark.parametrize("ratio", ["4.0", "2.0"])
def test_activations_are_what_autograd_keeps(norm: str, ratio: str) -> None:
    sizes = ["model.hidden_size=256", "model.num_heads=2", "model.depth=3", f"model.mlp_ratio={ratio}"]
    config = config_of(*sizes, f"model.qk_norm={norm}", "dtype=fp32", "device=cpu")
    shape = largest_shape(config, Bucket(config.data.bucket_config).entries)
    measured = kept_bytes(
        config, height=shape.height, width=shape.width, latent=(5, shape.height // 8, shape.width // 8)
    )
    assert activation_bytes_per_clip(config, shape) == pytest.approx(measured, rel=0.02)


def test_checkpointing_keeps_the_input_of_each_block_and_one_block() -> None:
    config = config_of("model.type=STDiT3-XL/2")
    shape = largest_shape(config, Bucket(config.data.bucket_config).entries)
    full = config_of("model.type=STDiT3-XL/2", "parallel.activation_checkpointing=full")
    assert 0.03 < activation_bytes_per_clip(full, shape) / activation_bytes_per_clip(config, shape) < 0.07


@pytest.mark.parametrize(
    ("overrides", "ranks", "per_parameter"),
    [
        (["dtype=fp32", "optim.ema_decay=null"], 1, (4, 4, 4, 8, 0)),
        ([], 1, (4, 2, 4, 8, 4)),
        ([], 8, (0.5, 2, 0.5, 1, 0.5)),
        (["parallel.replicas=2"], 8, (1, 2, 1, 2, 1)),
        (["train.accumulation=2"], 8, (0.5, 2, 4.5, 1, 0.5)),
        (["dtype=fp64"], 4, (2, 8, 2, 4, 2)),
    ],
)
def test_state_is_so_many_bytes_per_parameter(
    overrides: list[str], ranks: int, per_parameter: tuple[float, ...]
) -> None:
    config = config_of("model.type=STDiT3-XL/2", *overrides)
    state, total = state_bytes(config, ranks=ranks), count_parameters(config).total
    parts = (state.weights, state.gathered, state.gradients, state.optimizer, state.averages)
    assert [part / total for part in parts] == pytest.approx(per_parameter, rel=1e-3)
    zero3 = state_bytes(config_of("model.type=STDiT3-XL/2", *overrides, "parallel.sharding=zero3"), ranks=ranks)
    assert zero3.gathered < 0.05 * state.gathered
