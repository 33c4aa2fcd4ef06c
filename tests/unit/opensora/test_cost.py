from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from opensora.config.components import STDiT3Config
from opensora.datasets.bucket import Bucket
from opensora.datasets.cost import clip_flops, clip_tokens, latent_size, shape_costs
from opensora.models.stdit.stdit3 import STDiT3
from opensora.models.vae.codec import VideoCodec

XL = STDiT3Config(type="STDiT3-XL/2")


@pytest.mark.parametrize(
    ("frames", "latents"), [(51, 15), (102, 30), (204, 60), (408, 120), (1, 1), (16, 4), (34, 10), (96, 28)]
)
def test_frames_of_the_latent_are_those_of_the_published_vae(frames: int, latents: int) -> None:
    assert latent_size(frames, 426, 854) == (latents, 53, 106)


@pytest.mark.parametrize(
    ("frames", "height", "width", "space", "tokens", "gflop_per_token"),
    [
        (51, 144, 256, 144, 2160, 6.45),
        (51, 240, 426, 405, 6075, 6.52),
        (51, 360, 640, 920, 13800, 6.71),
        (51, 480, 864, 1620, 24300, 6.97),
        (51, 720, 1280, 3600, 54000, 7.74),
        (408, 720, 1280, 3600, 432000, 7.78),
        (1, 1080, 1920, 8160, 8160, 9.51),
    ],
)
def test_operations_per_token_of_the_xl_model(
    frames: int, height: int, width: int, space: int, tokens: int, gflop_per_token: float
) -> None:
    """Published for 120 text tokens, where torch's FLOP counter agrees to 0.1 %."""
    time, area = clip_tokens(num_frames=frames, height=height, width=width, model=XL)
    assert (area, time * area) == (space, tokens)
    flops = clip_flops(num_frames=frames, height=height, width=width, model=XL, text_tokens=120)
    assert flops / tokens / 1e9 == pytest.approx(gflop_per_token, abs=0.0051)


def test_every_matrix_product_of_a_small_model_is_counted() -> None:
    model = STDiT3Config(hidden_size=8, num_heads=2, depth=1, mlp_ratio=2.0, model_max_length=5)
    # 2 x 4 x 6 tokens; a product of [a, b] and [b, c] is 2abc operations.
    T, S, L, C = 2, 24, 5, 8
    N = T * S
    dense = 2 * N * C * (3 * C + C) + 2 * N * C * (C + C) + 2 * N * C * 2 * C * 2
    cross = 2 * (2 * N * L * C) + 2 * L * C * 2 * C
    spatial = 2 * T * (2 * S * S * C)
    temporal = 2 * S * (2 * T * T * C)
    forward = 2 * (dense + cross) + spatial + temporal
    assert clip_flops(num_frames=5, height=64, width=96, model=model) == 3 * forward


def test_torch_counts_the_same_operations_in_our_model() -> None:
    sizes: dict[str, Any] = {"hidden_size": 1152, "depth": 2, "num_heads": 16, "model_max_length": 20}
    time, height, width = latent_size(51, 144, 256)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = STDiT3(in_channels=4, caption_channels=64, **sizes)
        video, text = torch.zeros(1, 4, time, height, width), torch.zeros(1, 1, 20, 64)
        model(video, torch.zeros(1), text, fps=24, height=144, width=256).sum().backward()
    flops = clip_flops(num_frames=51, height=144, width=256, model=STDiT3Config(**sizes))
    assert flops == pytest.approx(counter.get_total_flops(), rel=2e-3)


def test_sizes_that_patches_do_not_divide_are_padded() -> None:
    assert clip_tokens(num_frames=1, height=240, width=426, model=XL) == (1, 15 * 27)


def test_costs_come_in_the_order_of_the_shapes_and_grow_with_them() -> None:
    shapes = Bucket({"144p": {1: (1.0, 4), 51: (1.0, 2)}, "240p": {51: (1.0, 1)}}).entries
    costs = shape_costs(shapes, XL)
    for shape, cost in zip(shapes, costs, strict=True):
        assert cost == clip_flops(num_frames=shape.num_frames, height=shape.height, width=shape.width, model=XL)
    by_name = {shape.name: cost for shape, cost in zip(shapes, costs, strict=True)}
    assert by_name["240p/51/0.56"] > by_name["144p/51/0.56"] > by_name["144p/1/0.56"] > 0
    assert (shape_costs(shapes, XL, text_tokens=10) < costs).all()


def test_the_cost_model_and_the_codec_agree_on_the_size_of_a_latent() -> None:
    codec = VideoCodec(channels=4)
    for num_frames in range(1, 120):
        assert latent_size(num_frames, 48, 80) == tuple(codec.get_latent_size([num_frames, 48, 80]))
