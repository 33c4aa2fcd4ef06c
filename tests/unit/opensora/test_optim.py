"""The learning rate, sharded AdamW and EMA against torch and closed forms."""

from __future__ import annotations

import contextlib

import pytest
import torch

from opensora.config.train import OptimConfig
from opensora.training.ema import EMA
from opensora.training.optim import ShardedAdamW, learning_rate


@pytest.mark.parametrize(("step", "rate"), [(0, 1e-4 / 1001), (999, 1e-4 * 1000 / 1001), (1000, 1e-4), (5000, 1e-4)])
def test_warm_up_rises_linearly_and_then_stays(step: int, rate: float) -> None:
    config = OptimConfig(lr=1e-4, warmup_steps=1000)
    assert learning_rate(step, config, total_steps=None) == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize(("schedule", "middle"), [("cosine", 0.55), ("linear", 0.55)])
def test_falling_rates_end_at_their_minimum(schedule: str, middle: float) -> None:
    config = OptimConfig(lr=1.0, min_lr=0.1, schedule=schedule)  # type: ignore[arg-type]  # the table's two names
    assert learning_rate(0, config, total_steps=101) == pytest.approx(1.0)
    assert learning_rate(50, config, total_steps=101) == pytest.approx(middle)
    assert learning_rate(100, config, total_steps=101) == pytest.approx(0.1)


def test_sharded_adamw_does_what_torch_does_with_scaled_gradients() -> None:
    config = OptimConfig(lr=1e-2, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6)
    torch.manual_seed(0)
    ours = {"a": torch.nn.Parameter(torch.randn(3, 4).double()), "b": torch.nn.Parameter(torch.randn(5).double())}
    theirs = [torch.nn.Parameter(parameter.detach().clone()) for parameter in ours.values()]
    optimizer = ShardedAdamW(ours, config)
    reference = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    for _ in range(5):
        gradients = [torch.randn_like(parameter) for parameter in theirs]
        for mine, parameter, gradient in zip(ours.values(), theirs, gradients, strict=True):
            mine.grad, parameter.grad = 4 * gradient, gradient.clone()
        expected = 16 * sum(float((gradient**2).sum()) for gradient in gradients)
        assert optimizer.squared_gradient_norm() == pytest.approx(expected)
        optimizer.step(lr=1e-2, scale=0.25)
        reference.step()
        assert all(parameter.grad is None for parameter in ours.values())
    for mine, parameter in zip(ours.values(), theirs, strict=True):
        torch.testing.assert_close(mine.detach(), parameter.detach(), rtol=1e-12, atol=1e-14)


def test_adamw_continues_from_its_tensors_and_step_count() -> None:
    config = OptimConfig(lr=1e-2)
    gradients = torch.randn(6, 7, generator=torch.Generator().manual_seed(1)).double()

    def run(optimizer: ShardedAdamW, weight: torch.nn.Parameter, rows: torch.Tensor) -> None:
        for row in rows:
            weight.grad = row.clone()
            optimizer.step(lr=1e-2, scale=1.0)

    whole = torch.nn.Parameter(torch.zeros(7).double())
    run(ShardedAdamW({"w": whole}, config), whole, gradients)
    first = torch.nn.Parameter(torch.zeros(7).double())
    begun = ShardedAdamW({"w": first}, config)
    run(begun, first, gradients[:4])
    second = torch.nn.Parameter(first.detach().clone())
    resumed = ShardedAdamW({"w": second}, config)
    for name, tensor in resumed.tensors().items():
        tensor.copy_(begun.tensors()[name])
    resumed.num_updates = 4
    run(resumed, second, gradients[4:])
    assert torch.equal(whole, second)


def test_ema_follows_its_closed_form_and_stands_in_for_the_weights() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    ema = EMA({"w": weight}, decay=0.9)
    with torch.no_grad():
        weight.copy_(torch.tensor([2.0, 4.0]))
    ema.update()
    ema.update()
    expected = torch.tensor([2 - 0.81, 4 - 2 * 0.81], dtype=torch.float64)
    torch.testing.assert_close(ema.tensors()["w"], expected)
    with ema.in_place_of_weights():
        torch.testing.assert_close(weight.detach(), expected)
    torch.testing.assert_close(weight.detach(), torch.tensor([2.0, 4.0], dtype=torch.float64))


def test_averages_restart_from_the_present_weights_and_give_them_back_after_an_error() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    ema = EMA({"w": weight}, decay=0.9)
    with torch.no_grad():
        weight.copy_(torch.tensor([5.0, 6.0]))
    seen = []
    with contextlib.suppress(ZeroDivisionError), ema.in_place_of_weights():
        seen = weight.tolist()
        raise ZeroDivisionError
    assert seen == [1.0, 2.0]
    assert weight.tolist() == [5.0, 6.0]
    ema.restart()
    assert ema.tensors()["w"].tolist() == [5.0, 6.0]


def test_a_parameter_without_gradient_stays_and_the_others_move() -> None:
    parameters = {name: torch.nn.Parameter(torch.ones(3)) for name in ("used", "unused")}
    optimizer = ShardedAdamW(parameters, OptimConfig(weight_decay=0.1))
    parameters["used"].grad = torch.ones(3)
    assert optimizer.squared_gradient_norm() == pytest.approx(3.0)
    optimizer.step(lr=0.1, scale=1.0)
    assert parameters["unused"].tolist() == [1.0] * 3
    assert parameters["used"].tolist() == pytest.approx([1 - 0.1 * 0.1 - 0.1] * 3, rel=1e-5)


def test_a_rank_whose_shards_are_empty_takes_part() -> None:
    """More ranks than rows: a rank may hold nothing of any parameter."""
    parameters = {"w": torch.nn.Parameter(torch.empty(0, 4))}
    optimizer = ShardedAdamW(parameters, OptimConfig())
    parameters["w"].grad = torch.empty(0, 4)
    assert optimizer.squared_gradient_norm() == 0.0
    optimizer.step(lr=0.1, scale=1.0)
    assert {name: tuple(tensor.shape) for name, tensor in optimizer.tensors().items()} == {
        "exp_avg.w": (0, 4),
        "exp_avg_sq.w": (0, 4),
    }


def test_gradients_are_dropped_without_a_step() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = ShardedAdamW({"w": weight}, OptimConfig())
    weight.grad = torch.ones(2)
    optimizer.zero_grad()
    assert optimizer.gradients() == []
    assert weight.tolist() == [1.0, 1.0]


def test_warm_up_meets_a_falling_rate_at_its_top() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=10, schedule="linear")
    rates = [learning_rate(step, config, total_steps=20) for step in range(20)]
    assert rates[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert rates[10:] == pytest.approx([1 - step / 9 for step in range(10)])
    assert learning_rate(30, config, total_steps=20) == 0.0, "never below the minimum"
