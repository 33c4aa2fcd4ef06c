from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from rich.console import Console

from opensora.models.vae.codec import VideoCodec
from opensora.quickstart.check import NearestClips, compare, distance, round_trips


def test_the_distance_is_that_to_the_nearest_window_in_squared_pixel_values() -> None:
    clip = torch.linspace(-1, 1, 9)[None, :, None, None].expand(3, 9, 4, 4)
    assert distance(clip[:, 4:8], clip) == 0
    # One step of the ramp is 0.25 of 2, and at the end of the clip the best window is half a step away.
    shifted = clip[:, 5:9] + 0.125
    assert distance(shifted, clip) == pytest.approx((0.125 * 127.5) ** 2)


def test_a_sample_counts_only_when_its_own_clip_is_nearer_than_all_others() -> None:
    distances = np.array([[1.0, 2.0, 3.0], [0.5, 0.7, 9.0], [4.0, 4.0, 4.0]])
    result = NearestClips(["a", "b", "c"], distances)
    assert result.nearest == [0, 0, -1]
    assert result.num_right == 1
    assert not result.all_right


def test_a_distance_that_is_not_a_number_is_no_match() -> None:
    result = NearestClips(["a", "b"], np.array([[np.nan, 1.0], [3.0, 1.0]]))
    assert result.nearest == [-1, 1]


def test_the_table_marks_the_nearest_clip_of_each_sample() -> None:
    result = NearestClips(["a", "b"], np.array([[10.0, 20.0], [30.0, 40.0]]))
    console = Console(file=io.StringIO(), width=80)
    console.print(result.table())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[10]" in text
    assert "[30]" in text
    assert "[20]" not in text


def test_clips_that_differ_come_back_from_the_codec_nearest_to_themselves_and_grey_ones_do_not() -> None:
    ramp = torch.linspace(-0.8, 0.8, 64)
    clips = [ramp[None, None, :, None].expand(3, 20, 64, 64), ramp[None, None, None, :].expand(3, 20, 64, 64)]
    decoded = round_trips(clips, VideoCodec(), num_frames=17)
    assert [tuple(one.shape) for one in decoded] == [(3, 17, 64, 64)] * 2
    assert compare(["down", "across"], decoded, clips).all_right
    assert not compare(["down", "across"], [torch.zeros(3, 17, 64, 64)] * 2, clips).all_right
