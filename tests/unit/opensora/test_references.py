"""References and mask strategies: where they land, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from opensora.errors import ConfigError, DataError
from opensora.models.vae.codec import VideoCodec
from opensora.sampling.references import (
    Placement,
    append_generated,
    apply_mask_strategy,
    collect_references_batch,
    dframe_to_frame,
    parse_mask_strategy,
    snap,
)


def apply(strategy: str, *, loop: int = 0, align: int | None = None) -> tuple[list[float], list[float]]:
    """15 latent frames of zeros; reference 0 is 1 to 15, reference 1 a single 100."""
    z = torch.zeros(1, 2, 15, 1, 1)
    refs = [torch.arange(1.0, 16).reshape(1, 15, 1, 1).expand(2, -1, -1, -1), torch.full((2, 1, 1, 1), 100.0)]
    mask = apply_mask_strategy(z, [refs], [strategy], loop, align)
    assert torch.equal(z[:, 0], z[:, 1])
    return z[0, 0].flatten().tolist(), mask[0].tolist()


def written(values: list[float]) -> dict[int, float]:
    return {i: value for i, value in enumerate(values) if value}


@pytest.mark.parametrize(
    ("strategy", "align", "expected"),
    [
        ("0", None, {0: 1}),
        ("0;0,1,0,-1,1", None, {0: 1, 14: 100}),
        ("0;0,1,0,-1,1", 5, {0: 1, 10: 100}),
        ("0,0,-8,0,8", 5, {i: 6 + i for i in range(8)}),
        ("0,0,-8,0,8", None, {i: 8 + i for i in range(8)}),
        ("1", None, {}),
        ("", None, {}),
        ("0,0,10,12,99", None, {12: 11, 13: 12, 14: 13}),
        ("0,1,0,3,5", None, {3: 100}),
    ],
)
def test_references_land_where_the_strategy_says(strategy: str, align: int | None, expected: dict[int, float]) -> None:
    values, mask = apply(strategy, align=align)
    assert written(values) == expected
    assert [i for i, value in enumerate(mask) if value == 0] == list(expected)
    assert all(mask[i] == 1 for i in range(15) if i not in expected)


def test_the_edit_ratio_becomes_the_mask() -> None:
    _, mask = apply("0,0,0,2,3,0.4")
    assert mask == pytest.approx([1, 1, 0.4, 0.4, 0.4] + [1] * 10)


def test_a_group_applies_in_its_loop_only() -> None:
    assert written(apply("0;1,1,0,4", loop=1)[0]) == {4: 100}


def test_samples_of_a_batch_have_masks_of_their_own() -> None:
    z = torch.zeros(2, 1, 5, 1, 1)
    mask = apply_mask_strategy(z, [[], [torch.ones(1, 1, 1, 1)]], ["", "0"], 0)
    assert mask.tolist() == [[1] * 5, [0, 1, 1, 1, 1]]
    assert z[0].abs().sum() == 0


def test_starts_snap_to_whole_chunks() -> None:
    assert [snap(value, 5, 15) for value in range(15)] == [0, 0, 0, 5, 5, 5, 5, 5, 10, 10, 10, 10, 10, 10, 10]
    assert [snap(value, 5, 3) for value in range(3)] == [0, 0, 0]


def test_missing_numbers_of_a_group_have_defaults() -> None:
    assert parse_mask_strategy("2,1") == [Placement(2, 1, 0, 0, 1, 0.0)]
    assert parse_mask_strategy("0, 0, 0, -5, 5, .3") == [Placement(0, 0, 0, -5, 5, 0.3)]
    assert parse_mask_strategy(None) == []


@pytest.mark.parametrize("strategy", ["a", "0,0,0,0,1,0,0", "0;", "0.5", "0,0,0,0,0", "0,0,0,0,1,2", "-1", "0,-1"])
def test_impossible_strategies_are_refused(strategy: str) -> None:
    with pytest.raises(DataError, match="mask strategy"):
        parse_mask_strategy(strategy)


@pytest.mark.parametrize(
    ("strategy", "message"), [("0,2", "there are 2"), ("0,0,0,15", "frame 15"), ("0,1,-2", "frame -2")]
)
def test_references_and_frames_that_do_not_exist_are_named(strategy: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        apply(strategy)


def test_references_are_read_brought_to_size_and_encoded(tmp_path: Path) -> None:
    for name, value in (("a.png", 255), ("b.png", 0)):
        Image.fromarray(np.full((40, 64, 3), value, np.uint8)).save(tmp_path / name)
    vae = VideoCodec()
    paths = f"{tmp_path / 'a.png'}; {tmp_path / 'b.png'}"
    first, second = collect_references_batch(["", paths], vae, (32, 48))
    assert first == []
    assert [tuple(ref.shape) for ref in second] == [(16, 1, 4, 6)] * 2
    white = vae.decode(second[0][None], num_frames=1)
    assert white.min() > 0.95


def test_a_missing_reference_is_named(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"gone\.png"):
        collect_references_batch([str(tmp_path / "gone.png")], VideoCodec(), (32, 32))


def test_a_loop_continues_the_end_of_the_clip_before() -> None:
    vae = VideoCodec()
    clip = torch.rand(2, 3, 34, 16, 16) * 2 - 1
    given: list[list[Tensor]] = [[], [torch.zeros(16, 1, 2, 2)]]
    refs, strategies = append_generated(vae, clip, given, ["", "0"], 1, 5, 0.25)
    assert [len(sample) for sample in refs] == [1, 2]
    assert strategies == ["1,0,-5,0,5,0.25", "0;1,1,-5,0,5,0.25"]
    assert [len(sample) for sample in given] == [0, 1]
    z = torch.zeros(2, 16, 10, 2, 2)
    mask = apply_mask_strategy(z, refs, strategies, 1)
    assert mask.tolist() == [[0.25] * 5 + [1] * 5] * 2
    assert torch.equal(z[:, :, :5], vae.encode(clip)[:, :, -5:])


def test_latent_frames_count_in_chunks() -> None:
    assert [dframe_to_frame(n) for n in (0, 5, 10)] == [0, 17, 34]
    with pytest.raises(ConfigError, match="multiple of 5"):
        dframe_to_frame(4)
