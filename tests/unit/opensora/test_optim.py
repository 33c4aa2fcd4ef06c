"""The learning rate, sharded AdamW and EMA against torch and closed forms."""

from __future__ import annotations

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
    resumed.set_step_count(4)
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
