"""Frame-conditioning masks of training: their shapes, shares and reproducibility."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch

from opensora.config.train import MASK_NAMES
from opensora.errors import ConfigError
from opensora.randomness import rng
from opensora.training.masks import MASKS, MaskGenerator


def draws(name: str, num_frames: int, count: int = 300) -> list[str]:
    """Masks as strings: `.` is a frame to predict, `#` a given one."""
    generator = MaskGenerator({name: 1.0})
    source = np.random.default_rng(0)
    return ["".join(".#"[not f] for f in generator.mask_for(num_frames, source)) for _ in range(count)]


def test_the_config_knows_exactly_these_masks() -> None:
    assert set(MASKS) == set(MASK_NAMES)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("identity", {"........"}),
        ("image_head", {"#......."}),
        ("image_tail", {".......#"}),
        ("image_head_tail", {"#......#"}),
        ("image_random", {"." * i + "#" + "." * (7 - i) for i in range(8)}),
        ("quarter_head", {"#.......", "##......"}),
        ("quarter_tail", {".......#", "......##"}),
        ("quarter_head_tail", {"#......#", "##....##"}),
        (
            "quarter_random",
            {"." * i + "#" + "." * (7 - i) for i in range(8)} | {"." * i + "##" + "." * (6 - i) for i in range(7)},
        ),
        ("intepolate", {"#.#.#.#.", ".#.#.#.#"}),
    ],
)
def test_each_mask_draws_all_of_its_forms_and_no_other(name: str, expected: set[str]) -> None:
    assert set(draws(name, 8)) == expected


def test_scattered_masks_give_between_a_tenth_and_nine_tenths_on_average() -> None:
    shares = [mask.count("#") / 1000 for mask in draws("random", 1000)]
    assert 0.05 < min(shares) < 0.2
    assert 0.8 < max(shares) < 0.95
    assert np.mean(shares) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("num_frames", [1, 2, 3, 4, 5, 15])
@pytest.mark.parametrize("name", list(MASKS))
def test_some_frame_is_always_to_be_predicted(name: str, num_frames: int) -> None:
    masks = draws(name, num_frames)
    assert all("." in mask and len(mask) == num_frames for mask in masks)
    if num_frames > 1 and name not in ("identity", "random"):
        assert all("#" in mask for mask in masks)


def test_masks_of_very_short_clips_fall_back_to_the_nearest_valid_one() -> None:
    assert set(draws("quarter_head", 3)) == {"#.."}
    assert set(draws("quarter_head_tail", 3)) == {"#.#"}
    assert set(draws("quarter_head_tail", 2)) == {"#."}
    assert set(draws("image_head_tail", 2)) == {"#."}


def test_masks_are_drawn_with_their_shares_and_the_rest_is_unmasked() -> None:
    generator = MaskGenerator({"image_head": 0.3, "image_tail": 0.2})
    source = np.random.default_rng(1)
    count = Counter(tuple(generator.mask_for(4, source)) for _ in range(4000))
    assert count[(False, True, True, True)] / 4000 == pytest.approx(0.3, abs=0.03)
    assert count[(True, True, True, False)] / 4000 == pytest.approx(0.2, abs=0.03)
    assert count[(True, True, True, True)] / 4000 == pytest.approx(0.5, abs=0.03)


def test_a_sample_has_the_same_mask_wherever_it_is_drawn() -> None:
    generator = MaskGenerator({"random": 0.5, "quarter_random": 0.5})

    def draw(row: int) -> list[bool]:
        return generator.mask_for(20, rng(7, epoch=1, row=row, purpose="mask"))

    assert [draw(row) for row in range(20)] == [draw(row) for row in reversed(range(20))][::-1]
    assert len({tuple(draw(row)) for row in range(20)}) > 10


def test_open_soras_calls_give_one_mask_per_sample() -> None:
    x = torch.zeros(32, 4, 15, 2, 2)
    generator = MaskGenerator({"random": 1.0})
    random.seed(5)
    masks = generator.get_masks(x)
    assert masks.shape == (32, 15)
    assert masks.dtype == torch.bool
    assert len({tuple(mask) for mask in masks.tolist()}) > 20
    random.seed(5)
    assert torch.equal(generator.get_masks(x), masks)
    assert generator.get_mask(x).shape == (15,)
    assert generator.get_masks(torch.zeros(2, 4, 1, 2, 2)).all()


@pytest.mark.parametrize(
    ("ratios", "message"),
    [
        ({"mask_head": 0.5}, "mask_head"),
        ({"random": 1.5}, "1.5"),
        ({"random": 0.7, "image_head": 0.7}, "1.4"),
        ({"random": 0.2, "identity": 0.2}, "0.4"),
        ({"random": float("nan")}, "nan"),
    ],
)
def test_impossible_shares_are_refused(ratios: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MaskGenerator(ratios)
