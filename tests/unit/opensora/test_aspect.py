from __future__ import annotations

import hashlib

import pytest

from opensora.datasets.aspect import (
    ASPECT_RATIO_MAP,
    ASPECT_RATIOS,
    get_closest_ratio,
    get_image_size,
    get_num_frames,
    get_num_pixels,
)
from opensora.errors import ConfigError


def test_the_tables_are_those_of_open_sora() -> None:
    lines = [
        f"{name} {pixels} {key} {height}x{width}"
        for name, (pixels, table) in ASPECT_RATIOS.items()
        if name != "64px"  # ours
        for key, (height, width) in table.items()
    ]
    # Taken from the published tables by another program than the one that wrote ours.
    assert (
        hashlib.sha256("\n".join(lines).encode()).hexdigest()
        == "3cc3f91b1c501affc86cb16c80efd70084d3960b10470e221376bc31a04b306c"
    )


@pytest.mark.parametrize("resolution", ASPECT_RATIOS)
def test_every_size_has_about_the_ratio_and_the_pixels_of_its_key(resolution: str) -> None:
    pixels, table = ASPECT_RATIOS[resolution]
    for key, (height, width) in table.items():
        assert height / width == pytest.approx(float(key), rel=0.04)
        assert height * width == pytest.approx(pixels, rel=0.13)


@pytest.mark.parametrize(
    ("resolution", "ratio", "size"),
    [
        ("240p", "9:16", (240, 426)),
        ("240p", "16:9", (426, 240)),
        ("480p", "1:1", (640, 640)),
        ("720p", "9:16", (720, 1280)),
        ("512", "1:1", (512, 512)),  # its key is "1.0", on which Open-Sora 1.2 fails
        ("2048", "2:1", (2816, 1408)),
        ("1024", "1.46", (1216, 832)),
        ("256", "0.40", (160, 400)),
    ],
)
def test_a_ratio_is_height_to_width(resolution: str, ratio: str, size: tuple[int, int]) -> None:
    assert get_image_size(resolution, ratio) == size


def test_an_unknown_resolution_or_ratio_lists_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"(?s)'241p'.*144p, 256, 240p"):
        get_image_size("241p", "9:16")
    with pytest.raises(ConfigError, match="'9:15'"):
        get_image_size("240p", "9:15")
    with pytest.raises(ConfigError, match=r"(?s)'9:16'.*1:1") as error:
        get_image_size("512", "9:16")
    assert "9:16" not in (error.value.hint or "")
    with pytest.raises(ConfigError, match="'8k'"):
        get_num_pixels("8k")


def test_every_ratio_that_users_write_has_a_size_in_the_video_resolutions() -> None:
    for ratio in ASPECT_RATIO_MAP:
        if ratio == "50:27":
            continue  # Open-Sora gives it the size of 25:12
        for resolution in ("144p", "240p", "360p", "480p", "720p", "1080p", "2k", "4k"):
            height, width = get_image_size(resolution, ratio)
            above, below = map(int, ratio.split(":"))
            assert height / width == pytest.approx(above / below, rel=0.03)


def test_nominal_pixels() -> None:
    assert get_num_pixels("144p") == 36864
    assert get_num_pixels("4k") == 8294400


def test_the_closest_ratio_is_that_of_height_to_width_and_the_first_of_a_tie() -> None:
    assert get_closest_ratio(240, 426, ASPECT_RATIOS["240p"][1]) == "0.56"
    assert get_closest_ratio(1, 1, ["0.5", "1.5"]) == "0.5"
    assert get_closest_ratio(1, 1, ["1.5", "0.5"]) == "1.5"
    assert get_closest_ratio(10, 1, ["0.5", "4.0"]) == "4.0"


@pytest.mark.parametrize(
    ("written", "frames"),
    [("1x", 51), ("2s", 51), ("2x", 102), ("4s", 102), ("4x", 204), ("8s", 204), ("8x", 408), ("16s", 408),
     ("16x", 816), ("32s", 816), ("17", 17), (17, 17)],
)  # fmt: skip
def test_lengths_by_name(written: str | int, frames: int) -> None:
    assert get_num_frames(written) == frames


@pytest.mark.parametrize("written", ["3y", "", "0", -5])
def test_nonsense_lengths_are_refused(written: str | int) -> None:
    with pytest.raises(ConfigError, match="not a number of frames"):
        get_num_frames(written)
