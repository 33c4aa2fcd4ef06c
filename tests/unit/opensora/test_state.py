"""What a checkpoint and an export hold, by name."""

from __future__ import annotations

import torch
from torch import nn

from opensora.acceleration.activation_checkpoint import checkpoint_blocks
from opensora.config.train import OptimConfig
from opensora.models.stdit.stdit3 import STDiT3
from opensora.training.ema import EMA
from opensora.training.optim import ShardedAdamW
from opensora.training.state import checkpoint_tensors, exported_tensors, model_tensors, trainable_parameters


def make_model(*, wrapped: bool = False, **settings: bool) -> STDiT3:
    torch.manual_seed(0)
    model = STDiT3(
        hidden_size=16, depth=2, num_heads=2, in_channels=4, caption_channels=8, model_max_length=6, **settings
    )
    if wrapped:
        checkpoint_blocks(model.blocks, "full")
    return model


def moved(model: nn.Module) -> EMA:
    """Averages that are 0.5 behind the weights."""
    ema = EMA(trainable_parameters(model), decay=0.5)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(1.0)
    ema.update()
    return ema


def test_names_are_the_published_ones_whether_blocks_are_wrapped_or_not() -> None:
    plain, wrapped = make_model(), make_model(wrapped=True)
    assert any("_checkpoint_wrapped_module" in name for name, _ in wrapped.named_parameters())
    assert list(model_tensors(wrapped)) == list(plain.state_dict())
    assert list(trainable_parameters(wrapped)) == [name for name, p in plain.named_parameters() if p.requires_grad]


def test_frozen_parameters_have_neither_moments_nor_averages() -> None:
    model = make_model(only_train_temporal=True)
    parameters = trainable_parameters(model)
    assert {name.split(".")[0] for name in parameters} == {"temporal_blocks"}
    state = checkpoint_tensors(model, ShardedAdamW(parameters, OptimConfig()), EMA(parameters, decay=0.9))
    prefixes = ("model.", "ema.", "optim.exp_avg.", "optim.exp_avg_sq.")
    names = {prefix: {name[len(prefix) :] for name in state if name.startswith(prefix)} for prefix in prefixes}
    assert names["model."] == set(model.state_dict())
    assert names["ema."] == names["optim.exp_avg."] == names["optim.exp_avg_sq."] == set(parameters)
    assert len(state) == sum(map(len, names.values()))


def test_loading_in_place_reaches_model_optimiser_and_averages() -> None:
    model = make_model(wrapped=True)
    parameters = trainable_parameters(model)
    optimizer, ema = ShardedAdamW(parameters, OptimConfig()), EMA(parameters, decay=0.9)
    with torch.no_grad():
        for number, tensor in enumerate(checkpoint_tensors(model, optimizer, ema).values()):
            tensor.fill_(number)
    again = checkpoint_tensors(model, optimizer, ema)
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(again.values()))
    assert len({int(parameter.detach().flatten()[0]) for parameter in model.parameters()}) == len(
        list(model.parameters())
    )


def test_averages_are_published_where_they_are_kept() -> None:
    model = make_model(freeze_y_embedder=True)
    ema = moved(model)
    exported, own = exported_tensors(model, ema), model.state_dict()
    assert set(exported) == set(own)
    for name, tensor in exported.items():
        trained = name in ema.tensors()
        torch.testing.assert_close(tensor, own[name] - 0.5 if trained else own[name])
    assert "y_embedder.y_proj.fc1.weight" not in ema.tensors()
    assert all(torch.equal(tensor, own[name]) for name, tensor in exported_tensors(model, None).items())
