"""Transforms: equal to torch's interpolation and PIL's, at every size; the right part is kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional as F  # noqa: N812

from opensora.datasets.transforms import ClipTransform
from opensora.errors import ConfigError


def noise(height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(height * 10_000 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def transformed(name: str, frame: NDArray[np.uint8], height: int, width: int) -> NDArray[np.float32]:
    out = np.full((3, height, width), np.nan, np.float32)
    ClipTransform(name, height=height, width=width).frame(frame, out)
    return out


def image_transformed(name: str, image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.float32]:
    out = np.full((3, height, width), np.nan, np.float32)
    ClipTransform(name, height=height, width=width).image(Image.fromarray(image), out)
    return out


def torch_cover_and_crop(frame: NDArray[np.uint8], height: int, width: int) -> torch.Tensor:
    """The specification, step by step, on the whole frame: float, resize, crop, normalise."""
    pixels = torch.from_numpy(frame).permute(2, 0, 1)[None].float() / 255
    h, w = frame.shape[:2]
    rh, rw = height / h, width / w
    size = (height, round(w * rh)) if rh > rw else (round(h * rw), width)
    pixels = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False)[0]
    top, left = int(round(size[0] - height) / 2.0), int(round(size[1] - width) / 2.0)
    return (pixels[:, top : top + height, left : left + width] - 0.5) / 0.5


SIZES = [
    ((720, 1280), (144, 256)),
    ((272, 640), (125, 291)),
    ((144, 176), (166, 221)),
    ((97, 131), (64, 64)),
    ((50, 300), (33, 47)),
    ((300, 50), (33, 47)),
    ((64, 64), (64, 64)),
    ((3, 5), (40, 24)),
    ((1, 1), (7, 9)),
]


@pytest.mark.parametrize(("source", "target"), SIZES)
def test_resize_crop_of_a_frame_equals_torch(source: tuple[int, int], target: tuple[int, int]) -> None:
    frame = noise(*source)
    expected = torch_cover_and_crop(frame, *target)
    np.testing.assert_allclose(transformed("resize_crop", frame, *target), expected.numpy(), atol=2e-6)


@settings(max_examples=60, deadline=None)
@given(h=st.integers(1, 90), w=st.integers(1, 90), th=st.integers(1, 60), tw=st.integers(1, 60))
def test_resize_crop_equals_torch_at_every_size(h: int, w: int, th: int, tw: int) -> None:
    frame = noise(h, w)
    np.testing.assert_allclose(
        transformed("resize_crop", frame, th, tw), torch_cover_and_crop(frame, th, tw).numpy(), atol=5e-6
    )


@pytest.mark.parametrize("source", [(96, 170), (170, 96), (64, 64), (48, 60), (30, 40), (101, 203)])
def test_centre_crop_of_a_frame_equals_torch_scaled_by_a_factor(source: tuple[int, int]) -> None:
    frame = noise(*source)
    pixels = torch.from_numpy(frame).permute(2, 0, 1)[None].float() / 255
    scaled = F.interpolate(pixels, scale_factor=64 / min(source), mode="bilinear", align_corners=False)[0]
    top, left = round((scaled.shape[1] - 64) / 2.0), round((scaled.shape[2] - 64) / 2.0)
    expected = (scaled[:, top : top + 64, left : left + 64] - 0.5) / 0.5
    assert expected.shape == (3, 64, 64)
    np.testing.assert_allclose(transformed("center", frame, 64, 64), expected.numpy(), atol=5e-6)


def test_centre_crop_fills_the_square_where_scaling_by_a_factor_rounds_down() -> None:
    side = next(n for n in range(1, 500) if int(n * (64 / n)) == 63)
    assert np.isfinite(transformed("center", noise(side, side + 9), 64, 64)).all()


def test_black_is_minus_one_and_white_is_one() -> None:
    frame = np.zeros((40, 60, 3), np.uint8)
    assert (transformed("resize_crop", frame, 20, 20) == -1).all()
    assert (transformed("resize_crop", frame + 255, 20, 20) == 1).all()


def test_a_frame_with_padded_lines_is_read_correctly() -> None:
    wide = noise(48, 80)
    padded = np.lib.stride_tricks.as_strided(wide, (48, 70, 3), wide.strides)
    np.testing.assert_array_equal(
        transformed("resize_crop", padded, 24, 32), transformed("resize_crop", padded.copy(), 24, 32)
    )


@pytest.mark.parametrize(("source", "target"), SIZES)
def test_resize_crop_of_an_image_is_pils_bicubic_with_its_own_rounding(
    source: tuple[int, int], target: tuple[int, int]
) -> None:
    image = noise(*source)
    (h, w), (height, width) = source, target
    rh, rw = height / h, width / w
    size = (height, round(w * rh)) if rh > rw else (round(h * rw), width)
    resized = np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BICUBIC))
    top, left = int(round((size[0] - height) / 2.0)), int(round((size[1] - width) / 2.0))  # noqa: RUF046
    expected = resized[top : top + height, left : left + width].transpose(2, 0, 1) / 127.5 - 1
    np.testing.assert_allclose(image_transformed("resize_crop", image, height, width), expected, atol=1e-6)


def test_images_and_videos_are_cut_at_the_offsets_of_the_original() -> None:
    # 3 columns too many: an image loses round(1.5) = 2 on the left, a video 1.
    columns = np.broadcast_to(np.arange(13, dtype=np.uint8)[None, :, None] * 10, (10, 13, 3)).copy()
    video, image = transformed("resize_crop", columns, 10, 10), image_transformed("resize_crop", columns, 10, 10)
    assert [round((float(x[0, 0, 0]) + 1) * 127.5) for x in (video, image)] == [10, 20]


def test_centre_crop_of_an_image_halves_with_boxes_first() -> None:
    image = noise(150, 260)
    halved = Image.fromarray(image).resize((130, 75), Image.Resampling.BOX)
    scaled = np.asarray(halved.resize((round(130 * 64 / 75), 64), Image.Resampling.BICUBIC))
    left = (scaled.shape[1] - 64) // 2
    expected = scaled[:, left : left + 64].transpose(2, 0, 1) / 127.5 - 1
    np.testing.assert_allclose(image_transformed("center", image, 64, 64), expected, atol=1e-6)


def test_centre_of_something_not_square_is_refused() -> None:
    with pytest.raises(ConfigError, match="144x256"):
        ClipTransform("center", height=144, width=256)


def test_an_unknown_transform_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="known transforms: resize_crop, center"):
        ClipTransform("random_crop", height=8, width=8)
