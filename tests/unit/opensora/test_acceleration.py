"""One rank: meshes, sharding and activation checkpointing change where things are, not what is computed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from opensora.acceleration.activation_checkpoint import checkpoint_blocks
from opensora.acceleration.mesh import World, choose_device, init_world
from opensora.acceleration.sharding import free_gathered_weights, like_shard, local_shard, shard_model
from opensora.config.train import ParallelConfig
from opensora.errors import ConfigError
from opensora.models.stdit.stdit3 import STDiT3

MODES: tuple[Literal["none", "full"], ...] = ("none", "full")


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    num_threads = torch.get_num_threads()
    world = init_world(ParallelConfig(num_cpu_threads=num_threads), device="cpu")
    yield world
    world.close()


def make_model(dtype: torch.dtype = torch.float64) -> STDiT3:
    torch.manual_seed(0)
    model = STDiT3(hidden_size=32, depth=4, num_heads=2, in_channels=4, caption_channels=8, model_max_length=6)
    for name, parameter in model.named_parameters():
        if name != "rope.freqs":
            nn.init.normal_(parameter, std=0.2)
    return model.to(dtype)


def compute(model: nn.Module, dtype: torch.dtype = torch.float64) -> Tensor:
    draws = torch.Generator().manual_seed(1)
    output: Tensor = model(
        torch.randn(2, 4, 3, 8, 8, generator=draws, dtype=dtype),
        torch.tensor([100.0, 700.0], dtype=dtype),
        torch.randn(2, 1, 6, 8, generator=draws, dtype=dtype),
        mask=[6, 3],
        x_mask=torch.tensor([[True, False, True], [True, True, True]]),
        fps=torch.tensor([24.0, 30.0]),
        height=64,
        width=64,
        drop_text=torch.tensor([False, True]),
    )
    return output


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name.replace("_checkpoint_wrapped_module.", "")] = local_shard(parameter.grad)
    return found


# --------------------------------------------------------------------------------------- activation checkpointing


def test_checkpointing_gives_the_same_output_and_gradients_bit_for_bit() -> None:
    outputs, found = [], []
    for mode in MODES:
        model = make_model().train()
        checkpoint_blocks(model.blocks, mode)
        output = compute(model)
        (output**2).mean().backward()  # type: ignore[no-untyped-call]
        outputs.append(output.detach())
        found.append(gradients(model))
    assert torch.equal(outputs[0], outputs[1])
    assert set(found[0]) == set(found[1])
    assert len(found[0]) > 50
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())


def test_checkpointing_keeps_less_for_the_backward_pass() -> None:
    kept = {}
    for mode in MODES:
        model = make_model().train()
        checkpoint_blocks(model.blocks, mode)
        compute(model)  # what is made once and kept, such as position embeddings, does not count
        with torch.profiler.profile(profile_memory=True) as profile:
            output = compute(model)
        kept[mode] = sum(event.self_cpu_memory_usage for event in profile.events() or ())
        del output
    assert kept["full"] < kept["none"] / 4
    assert kept["full"] > 8 * 2 * 3 * 16 * 32 * 8, "the input of each of eight blocks is kept"


def test_checkpointed_blocks_run_again_in_the_backward_pass() -> None:
    counts = []
    for mode in MODES:
        model = make_model().train()
        calls: list[str] = []
        model.spatial_blocks[0].register_forward_pre_hook(lambda *_, calls=calls, mode=mode: calls.append(mode))
        checkpoint_blocks(model.blocks, mode)
        compute(model).sum().backward()  # type: ignore[no-untyped-call]
        counts.append(calls)
    assert counts == [["none"], ["full", "full"]]


# ---------------------------------------------------------------------------------------------------- sharding


@pytest.mark.parametrize("sharding", ["zero2", "zero3"])
def test_a_sharded_model_has_the_gradients_of_the_whole(world: World, sharding: Literal["zero2", "zero3"]) -> None:
    whole, sharded = make_model().train(), make_model().train()
    checkpoint_blocks(sharded.blocks, "full")
    shard_model(sharded, sharded.blocks, world=world, sharding=sharding, compute_dtype=torch.float64)
    for model in (whole, sharded):
        (compute(model) ** 2).mean().backward()  # type: ignore[no-untyped-call]
    expected, found = gradients(whole), gradients(sharded)
    assert list(found) == list(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-15)


def test_low_precision_compute_keeps_masters_and_gradients_in_fp32(world: World) -> None:
    exact, model = make_model(torch.float32).train(), make_model(torch.float32).train()
    shard_model(model, model.blocks, world=world, sharding="zero2", compute_dtype=torch.bfloat16)
    seen = []
    model.spatial_blocks[0].register_forward_hook(lambda module, given, output: seen.append(output.dtype))
    output, expected = (compute(each, torch.float32) for each in (model, exact))
    (output**2).mean().backward()  # type: ignore[no-untyped-call]
    assert seen == [torch.bfloat16]
    assert output.dtype == torch.float32
    assert not torch.equal(output, expected)
    torch.testing.assert_close(output, expected, rtol=0, atol=0.1 * float(expected.detach().std()))
    assert {gradient.dtype for gradient in gradients(model).values()} == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_new_weights_are_seen_after_a_pass_without_backward(world: World) -> None:
    model = make_model().eval()
    # In another type, since gathering would otherwise copy nothing on one rank.
    shard_model(model, model.blocks, world=world, sharding="zero2", compute_dtype=torch.float32)
    weights = [local_shard(model.get_parameter(f"final_layer.linear.{name}")) for name in ("weight", "bias")]
    with torch.no_grad():
        first = compute(model)
        free_gathered_weights(model)
        for weight in weights:
            weight.mul_(2.0)
        second = compute(model)
    assert torch.equal(second, 2 * first)


def test_a_local_part_shares_memory_with_the_whole(world: World) -> None:
    model = make_model()
    shard_model(model, model.blocks, world=world, sharding="zero2", compute_dtype=torch.float64)
    parameter = model.get_parameter("x_embedder.proj.weight")
    assert isinstance(parameter, DTensor)
    local = local_shard(parameter)
    assert not isinstance(local, DTensor)
    assert not local.requires_grad
    twin = like_shard(torch.zeros_like(local), parameter)
    assert isinstance(twin, DTensor)
    assert (twin.shape, twin.placements) == (parameter.shape, parameter.placements)
    local.fill_(3.0)
    assert bool((parameter.full_tensor() == 3).all())
    plain = torch.ones(2)
    assert like_shard(plain, torch.zeros(2)) is plain


# -------------------------------------------------------------------------------------------------------- mesh


def test_a_rank_alone_agrees_with_itself(world: World) -> None:
    assert (world.rank, world.size, world.is_main, world.device) == (0, 1, True, torch.device("cpu"))
    assert world.sum([1.5, 2.0**60 + 256]) == [1.5, 2.0**60 + 256], "in fp64"
    assert (world.any(True), world.any(False)) == (True, False)
    assert world.gather({"a": 1}) == [{"a": 1}]
    assert world.broadcast("text") == "text"
    world.barrier()
    assert world.mesh.mesh_dim_names == ("shard",)


def test_replicas_must_divide_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(ConfigError, match=r"parallel\.replicas=4 does not divide the 6 ranks"):
        init_world(ParallelConfig(replicas=4), device="cpu")
    assert not dist.is_initialized()


def test_a_gpu_that_is_not_there_is_refused_and_auto_takes_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="PyTorch sees no GPU"):
        choose_device("cuda")
    assert choose_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda", 3)
    assert choose_device("cpu") == torch.device("cpu")
