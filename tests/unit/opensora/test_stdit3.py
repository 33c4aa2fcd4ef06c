"""STDiT3 against frozen reference values, published shapes, and slow paths."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from opensora.models.stdit.stdit3 import STDiT3

SMALL = {"hidden_size": 48, "depth": 2, "num_heads": 4, "caption_channels": 16, "model_max_length": 8}
FULL_AND_SHORT = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
FRAME_MASK = torch.tensor([[True, False, True], [False, True, True]])


def waves(shape: tuple[int, ...], step: float, *, cosine: bool = False) -> Tensor:
    values = torch.arange(math.prod(shape), dtype=torch.float64) * step
    return (values.cos() if cosine else values.sin()).view(shape).float()


def fill(model: torch.nn.Module, *, amplitude: float, step: float) -> int:
    """Deterministic weights, by a rule that the recorded outputs of the reference were made with."""
    names = sorted(n for n in model.state_dict() if n != "rope.freqs" and "pos_embed" not in n)
    for i, name in enumerate(names):
        value = model.state_dict()[name]
        flat = amplitude * torch.sin(step * torch.arange(value.numel(), dtype=torch.float64) + i)
        if value.ndim == 1 and name.endswith("weight"):
            flat = flat + 1
        value.copy_(flat.view(value.shape))
    return len(names)


def small(**keywords: Any) -> STDiT3:
    return STDiT3(**{**SMALL, **keywords}).eval()


def inputs(**keywords: Any) -> dict[str, Any]:
    return {
        "x": waves((2, 4, 3, 5, 6), 0.9),
        "timestep": torch.tensor([500.0, 20.0]),
        "y": waves((2, 1, 8, 16), 0.8, cosine=True),
        "mask": FULL_AND_SHORT,
        "fps": 24,
        "height": 40,
        "width": 48,
        **keywords,
    }


@pytest.mark.parametrize(
    ("case", "total", "absolute", "first", "last"),
    [
        ({"mask": FULL_AND_SHORT}, 124.693028, 2801.468148, [2.853084, 1.859574, 2.903974, 1.859789],
         [-3.073677, -0.453646, -3.016413, -0.466832]),
        ({"mask": FULL_AND_SHORT, "x_mask": FRAME_MASK}, 142.225294, 3253.065694,
         [2.847713, 1.863996, 2.89896, 1.863665], [-3.069173, -0.467022, -3.012203, -0.479359]),
        ({"mask": None}, 124.680829, 2801.077644, [2.853084, 1.859574], [-3.072794, -0.45381, -3.015663, -0.466969]),
    ],
    ids=["plain", "frame mask", "no text mask"],
)  # fmt: skip
@torch.no_grad()
def test_outputs_equal_the_recorded_ones_of_the_reference(
    case: dict[str, Any], total: float, absolute: float, first: list[float], last: list[float]
) -> None:
    model = small()
    assert fill(model, amplitude=0.4, step=0.7) == 88
    out = model(**inputs(**case, num_frames=3, ar=40 / 48))
    assert out.shape == (2, 8, 3, 5, 6)
    assert out.sum().item() == pytest.approx(total, rel=1e-4)
    assert out.abs().sum().item() == pytest.approx(absolute, rel=1e-4)
    assert out.flatten()[: len(first)].tolist() == pytest.approx(first, rel=1e-4)
    assert out.flatten()[-len(last) :].tolist() == pytest.approx(last, rel=1e-4)


@pytest.mark.parametrize(
    ("case", "total", "absolute", "last"),
    [
        ({"mask": FULL_AND_SHORT}, 30.863488, 339.317099, [0.143045, 0.168057, 0.2139, 0.323605]),
        ({"mask": FULL_AND_SHORT, "x_mask": FRAME_MASK}, 32.780835, 328.761955, [0.143045, 0.168057, 0.2139, 0.323604]),
        ({"mask": None}, 30.863514, 339.318796, [0.143045, 0.168059, 0.2139, 0.323607]),
    ],
    ids=["plain", "frame mask", "no text mask"],
)
@torch.no_grad()
def test_outputs_equal_the_recorded_ones_for_slowly_varying_weights(
    case: dict[str, Any], total: float, absolute: float, last: list[float]
) -> None:
    model = small()
    fill(model, amplitude=0.05, step=0.1)
    slow = {"x": waves((2, 4, 3, 5, 6), 0.01), "y": waves((2, 1, 8, 16), 0.02, cosine=True)}
    out = model(**inputs(**slow, **case))
    assert out.sum().item() == pytest.approx(total, rel=1e-4)
    assert out.abs().sum().item() == pytest.approx(absolute, rel=1e-4)
    assert out.flatten()[:5].tolist() == pytest.approx([-0.36707, -0.151713, -0.468305, -0.149731, -0.629096], rel=1e-4)
    assert out.flatten()[-4:].tolist() == pytest.approx(last, rel=1e-4)
